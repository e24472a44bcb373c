"""DoRA: train the magnitudes of the columns or rows of W + ΔW separately (arXiv 2402.09353, equation 5):
W' = m · V / ‖V‖ with V = W + ΔW. m starts as ‖W‖; ‖V‖ is not differentiated (section 4.3 there).

In files `dora_scale`: m of each input, (1, in) or (1, in, 1, 1), as in the paper's equation, OneTrainer and the WebUIs;
or of each output, (out, 1) or (out, 1, 1, 1), as in the paper's code, PEFT and diffusers. The shape tells which.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from networks.adapter import AdapterError, Layer
from networks.layer_tensors import WRONG_MODEL

KEY = "dora_scale"
_LEAST = 1e-8


def norms(weight: Tensor, *, by_output: bool) -> Tensor:
    """‖W‖ of each output (out, 1, …) or each input (1, in, …), in float32 (float64 for float64)."""
    exact = weight if weight.dtype is torch.float64 else weight.float()
    axes = [axis for axis in range(exact.ndim) if axis != (0 if by_output else 1)]
    result: Tensor = torch.linalg.vector_norm(exact, dim=axes, keepdim=True)
    return result


def magnitude(weight: Tensor, *, by_output: bool) -> Tensor:
    """The initial m = ‖W‖ on the CPU, in float32 (float64 for float64); ones if W is on the meta device."""
    if weight.is_meta:
        axis = 0 if by_output else 1
        return torch.ones([size if place == axis else 1 for place, size in enumerate(weight.shape)])
    return norms(weight.detach(), by_output=by_output).cpu()


def reshape_scale(layer: Layer, scale: Tensor) -> Tensor:
    """A file's dora_scale with as many axes as the layer's weight; a vector that could be either is per output, as in
    PEFT. AdapterError if it does not fit."""
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


def factor(adapter: Any, weight: Tensor) -> Tensor:
    """m / ‖V‖, of the shape of m, for a base weight of any dtype. Only m gets gradients."""
    scale: Tensor = adapter.dora_scale
    by_output = is_by_output(scale, tuple(weight.shape))
    work = torch.float64 if torch.float64 in (weight.dtype, scale.dtype) else torch.float32
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        of_sum = getattr(adapter, "merged_norms", None)
        length = None if of_sum is None else of_sum(weight, work, by_output=by_output)
        if length is None:
            base = weight.to(work)
            length = norms(base + adapter.delta(base), by_output=by_output)
    return scale.to(work) / length.clamp(min=_LEAST)


def merged_weight(adapter: Any, weight: Tensor, multiplier: float) -> Tensor:
    """W + multiplier · (W' - W) in the dtype of the base's `weight`, as ComfyUI and A1111 apply a multiplier."""
    with torch.autocast(weight.device.type, enabled=False):
        whole: Tensor = (weight + adapter.delta(weight)) * factor(adapter, weight).to(weight.dtype)
        return whole if multiplier == 1 else torch.lerp(weight, whole, multiplier)
