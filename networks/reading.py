"""Taking the tensors of one layer out of what a file holds of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from networks.adapter import AdapterError, Layer

if TYPE_CHECKING:
    from torch import Tensor

_OTHER_MODEL = "The file belongs to another model or is damaged; load it with the model that it was trained on."


def take(layer: Layer, tensors: dict[str, Tensor], *names: str, axes: int = 2) -> tuple[Tensor, ...]:
    """These tensors, taken out of `tensors`. AdapterError that names every one which is missing, or for one that has
    fewer axes than `axes`."""
    missing = [name for name in names if name not in tensors]
    if missing:
        has = ", ".join(sorted(tensors)) or "nothing"
        raise AdapterError(f"{layer.name} has no {' and no '.join(missing)}, only {has}", "The file is incomplete.")
    for name in names:
        if tensors[name].ndim < axes:
            raise misfit(layer, f"and {name} has {tensors[name].ndim} axes")
    return tuple(tensors.pop(name) for name in names)


def take_alpha(tensors: dict[str, Tensor], dim: int) -> float:
    """The alpha of a layer, or `dim` where the file has none: no scaling then."""
    alpha = tensors.pop("alpha", None)
    return float(dim) if alpha is None else float(alpha)


def scale(alpha: Tensor | float, dim: int) -> float:
    """alpha / dim; an alpha of 0 means no scaling, as in kohya-style files."""
    return float(alpha) / dim or 1.0


def product_norm(down: Tensor, up: Tensor) -> Tensor:
    """‖B A‖ (Frobenius) of A (r, …) and B (out, r, …) without forming the product: the sum of (BᵀB) ∘ (AAᵀ), in float32
    at least."""
    down, up = (one.detach().flatten(1) for one in (down, up))
    down, up = (one if one.dtype.itemsize > 4 else one.float() for one in (down, up))
    squared: Tensor = ((up.mT @ up) * (down @ down.mT)).sum()
    return squared.clamp(min=0).sqrt()


def want(layer: Layer, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """AdapterError unless the tensor has this shape."""
    if tuple(tensor.shape) != tuple(shape):
        was = " x ".join(map(str, tensor.shape)) or "a single number"
        raise AdapterError(f"{layer.name}: {name} is {was}, and not {' x '.join(map(str, shape))}", _OTHER_MODEL)


def misfit(layer: Layer, what: str) -> AdapterError:
    """The error of tensors which make no change of this layer's shape; `what` says what they do make."""
    return AdapterError(f"{layer.name} is {' x '.join(map(str, layer.shape))}, {what}", _OTHER_MODEL)
