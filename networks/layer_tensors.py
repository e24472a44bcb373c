"""Take the tensors of one layer from a file, and check their shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from networks.adapter import AdapterError, Layer

if TYPE_CHECKING:
    from torch import Tensor

WRONG_MODEL = "use the model that the file was trained on; if it is the right one, the file is damaged: get it again"


def take(layer: Layer, tensors: dict[str, Tensor], *names: str, axes: int = 2) -> tuple[Tensor, ...]:
    """Remove these tensors from `tensors` and return them. AdapterError that names all missing ones, or one with fewer
    than `axes` axes."""
    missing = [name for name in names if name not in tensors]
    if missing:
        present = ", ".join(sorted(tensors)) or "nothing"
        raise AdapterError(
            f"{layer.name} has no {' and no '.join(missing)}, only {present}", "the file is incomplete: get it again"
        )
    for name in names:
        if tensors[name].ndim < axes:
            raise shape_error(layer, f"{name} has {tensors[name].ndim} axes")
    return tuple(tensors.pop(name) for name in names)


def take_alpha(tensors: dict[str, Tensor], dim: int) -> float:
    """The alpha of a layer, or `dim` (no scaling) if the file has none."""
    alpha = tensors.pop("alpha", None)
    return float(dim) if alpha is None else float(alpha)


def scale(alpha: Tensor | float, dim: int) -> float:
    """alpha / dim; an alpha of 0 means no scaling, as in kohya-style files."""
    return float(alpha) / dim or 1.0


def product_norm(down: Tensor, up: Tensor) -> Tensor:
    """‖B A‖ (Frobenius) of A (r, …) and B (out, r, …) without forming the product: the sum of (BᵀB) ∘ (AAᵀ), in at
    least float32."""
    down, up = (factor.detach().flatten(1) for factor in (down, up))
    down, up = (factor if factor.dtype.itemsize > 4 else factor.float() for factor in (down, up))
    squared: Tensor = ((up.mT @ up) * (down @ down.mT)).sum()
    return squared.clamp(min=0).sqrt()


def check_shape(layer: Layer, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """AdapterError unless the tensor has this shape."""
    if tuple(tensor.shape) != tuple(shape):
        found = " x ".join(map(str, tensor.shape)) or "a single number"
        raise AdapterError(f"{layer.name}: {name} is {found}, expected {' x '.join(map(str, shape))}", WRONG_MODEL)


def shape_error(layer: Layer, what: str) -> AdapterError:
    """The error for tensors that do not fit the layer's shape; `what` describes the tensors."""
    return AdapterError(f"{layer.name} is {' x '.join(map(str, layer.shape))}, but {what}", WRONG_MODEL)
