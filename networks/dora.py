"""DoRA: the rows of W + ΔW keep their direction and get a length of their own (arXiv 2402.09353, equation 5):
W' = m · V / ‖V‖ with V = W + ΔW. m starts as ‖W‖; ‖V‖ is not differentiated (section 4.3 there).

In files `dora_scale`: m for each output, (out, 1) or (out, 1, 1, 1), as the paper's code and PEFT have it and as it is
trained here; or for each input, (1, in), as LyCORIS wrote it for long and OneTrainer does: read, told by its shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from networks.adapter import AdapterError, Layer

KEY = "dora_scale"
_LEAST = 1e-8


def lengths(weight: Tensor, *, by_output: bool = True) -> Tensor:
    """‖W‖ of each output (out, 1, …) or each input (1, in, …), in float32, of float64 in float64."""
    exact = weight if weight.dtype is torch.float64 else weight.float()
    axes = [axis for axis in range(exact.ndim) if axis != (0 if by_output else 1)]
    found: Tensor = torch.linalg.vector_norm(exact, dim=axes, keepdim=True)
    return found


def magnitude(weight: Tensor) -> Tensor:
    """m at the start, ‖W‖, on the CPU, in float32 (for a base in float64 in that); W may lie on the meta device, where
    it has no values."""
    if weight.is_meta:
        return torch.ones(weight.shape[0], *(1 for _ in weight.shape[1:]))
    return lengths(weight.detach()).cpu()


def fitted(layer: Layer, scale: Tensor) -> Tensor:
    """A file's dora_scale in the number of axes that the layer's weight has. AdapterError if it does not fit."""
    ones = [1] * (len(layer.shape) - 2)
    for shape in ((layer.shape[0], 1, *ones), (1, layer.shape[1], *ones)):
        flat = shape[0] * shape[1]
        if scale.numel() == flat and (scale.ndim == 1 or tuple(scale.shape[:2]) == shape[:2]):
            return scale.reshape(shape)
    raise AdapterError(
        f"{layer.name}: dora_scale is {tuple(scale.shape)}, the weight {layer.shape}",
        "The file belongs to another model or is damaged; load it with the model that it was trained on.",
    )


def is_by_output(scale: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a dora_scale is for outputs; for inputs otherwise."""
    return scale.shape[0] == shape[0] and scale.shape[1] == 1


def factor(adapter: Any, weight: Tensor, multiplier: float) -> Tensor:
    """1 + multiplier · (m / ‖V‖ - 1), of the shape of m, for a base's weight in any dtype; gradients reach m only."""
    scale: Tensor = adapter.dora_scale
    by_output = is_by_output(scale, tuple(weight.shape))
    work = torch.float64 if torch.float64 in (weight.dtype, scale.dtype) else torch.float32
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        of_sum = getattr(adapter, "lengths_of_sum", None)
        length = of_sum(weight, work) if by_output and of_sum is not None else None
        if length is None:
            base = weight.to(work)
            length = lengths(base + adapter.delta(base), by_output=by_output)
    ratio = scale.to(work) / length.clamp(min=_LEAST)
    return ratio if multiplier == 1 else 1 + multiplier * (ratio - 1)


def decomposed(adapter: Any, weight: Tensor, multiplier: float) -> Tensor:
    """W' in the dtype of `weight`, the base's: (W + multiplier · ΔW) times the factor."""
    with torch.autocast(weight.device.type, enabled=False):
        changed = torch.add(weight, adapter.delta(weight), alpha=multiplier)
        return changed * factor(adapter, weight, multiplier).to(weight.dtype)
