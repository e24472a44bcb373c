"""DoRA: train the magnitude of the rows of W + ΔW separately (arXiv 2402.09353, equation 5):
W' = m · V / ‖V‖ with V = W + ΔW. m starts as ‖W‖; ‖V‖ is not differentiated (section 4.3 there).

In files `dora_scale`: m for each output, (out, 1) or (out, 1, 1, 1), as in the paper's code, PEFT and this trainer;
or for each input, (1, in), as in older LyCORIS files and OneTrainer's, recognised by its shape and only loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from networks.adapter import AdapterError, Layer
from networks.layer_tensors import WRONG_MODEL

KEY = "dora_scale"
_LEAST = 1e-8


def norms(weight: Tensor, *, by_output: bool = True) -> Tensor:
    """‖W‖ of each output (out, 1, …) or each input (1, in, …), in float32 (float64 for float64)."""
    exact = weight if weight.dtype is torch.float64 else weight.float()
    axes = [axis for axis in range(exact.ndim) if axis != (0 if by_output else 1)]
    result: Tensor = torch.linalg.vector_norm(exact, dim=axes, keepdim=True)
    return result


def magnitude(weight: Tensor) -> Tensor:
    """The initial m = ‖W‖ on the CPU, in float32 (float64 for float64); ones if W is on the meta device."""
    if weight.is_meta:
        return torch.ones(weight.shape[0], *(1 for _ in weight.shape[1:]))
    return norms(weight.detach()).cpu()


def reshape_scale(layer: Layer, scale: Tensor) -> Tensor:
    """A file's dora_scale with as many axes as the layer's weight. AdapterError if it does not fit."""
    ones = [1] * (len(layer.shape) - 2)
    for shape in ((layer.shape[0], 1, *ones), (1, layer.shape[1], *ones)):
        flat = shape[0] * shape[1]
        if scale.numel() == flat and (scale.ndim == 1 or tuple(scale.shape[:2]) == shape[:2]):
            return scale.reshape(shape)
    raise AdapterError(
        f"{layer.name}: dora_scale is {tuple(scale.shape)}, but the weight is {layer.shape}", WRONG_MODEL
    )


def is_by_output(scale: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a dora_scale is per output; else it is per input."""
    return scale.shape[0] == shape[0] and scale.shape[1] == 1


def factor(adapter: Any, weight: Tensor, multiplier: float) -> Tensor:
    """1 + multiplier · (m / ‖V‖ - 1), of the shape of m, for a base weight of any dtype. Only m gets gradients."""
    scale: Tensor = adapter.dora_scale
    by_output = is_by_output(scale, tuple(weight.shape))
    work = torch.float64 if torch.float64 in (weight.dtype, scale.dtype) else torch.float32
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        of_sum = getattr(adapter, "merged_norms", None)
        length = of_sum(weight, work) if by_output and of_sum is not None else None
        if length is None:
            base = weight.to(work)
            length = norms(base + adapter.delta(base), by_output=by_output)
    ratio = scale.to(work) / length.clamp(min=_LEAST)
    return ratio if multiplier == 1 else 1 + multiplier * (ratio - 1)


def merged_weight(adapter: Any, weight: Tensor, multiplier: float) -> Tensor:
    """W' in the dtype of the base's `weight`: (W + multiplier · ΔW) times the factor."""
    with torch.autocast(weight.device.type, enabled=False):
        changed = torch.add(weight, adapter.delta(weight), alpha=multiplier)
        return changed * factor(adapter, weight, multiplier).to(weight.dtype)
