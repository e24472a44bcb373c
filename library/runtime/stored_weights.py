"""Keep frozen weights in half precision or quantised, and compute with them in float32: less memory, the arithmetic of
fp32.

A layer's weight is cast to the dtype of its input in the forward pass, and again in the backward pass, so only one
layer's weight is in float32 at a time. All layers share one buffer for it: allocating buffers of many sizes would
fragment memory (1.4 GB in a step of Stable Diffusion 1.5). Only the rounding of the stored weights changes the result,
and weights from a file in half precision are not rounded by it. Under autocast, layers compute in its dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from library.runtime.packed_weight import PackedWeight

Cast = Callable[[Tensor, torch.dtype], Tensor]


@dataclass
class CastBuffer:
    """A buffer for one cast weight at a time: `cast` overwrites its previous result, so do not keep that."""

    memory: Tensor | None = None

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Cast a frozen weight into the buffer."""
        is_packed = isinstance(weight, PackedWeight)
        if weight.dtype == dtype and not is_packed:
            return weight
        memory = self.memory
        if memory is None or memory.numel() < weight.numel() or (memory.dtype, memory.device) != (dtype, weight.device):
            memory = self.memory = torch.empty(weight.numel(), dtype=dtype, device=weight.device)
        into = memory[: weight.numel()].view(weight.shape)
        return weight.unpacked(out=into) if isinstance(weight, PackedWeight) else into.copy_(weight)


def compute_in_fp32(module: nn.Module) -> None:
    """Let the Linear, Conv2d and Embedding layers of a frozen module whose weights are in half precision or quantised
    compute in the dtype of their input, float32. Other parameters (biases, norms) must be in float32 already.

    Adapters that use the weight directly find `computes_plainly` and `cast` on the layer's forward.
    """
    buffer = CastBuffer()
    stored = [layer for layer in module.modules() if _is_stored(layer)]
    sizes = [layer.weight.numel() for layer in stored if isinstance(layer, nn.Linear | nn.Conv2d)]
    if sizes:
        device = next(module.parameters()).device
        buffer.memory = torch.empty(max(sizes), dtype=torch.float32, device=device)
    for layer in stored:
        forward = _fp32_forward(layer, buffer.cast)
        if forward is not None:
            vars(forward).update(computes_plainly=True, cast=buffer.cast)
            vars(layer)["forward"] = forward  # overrides the method of the class


def _is_stored(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    is_half = isinstance(weight, Tensor) and weight.dtype in (torch.float16, torch.bfloat16)
    return is_half or isinstance(weight, PackedWeight)


def _fp32_forward(layer: nn.Module, cast: Cast) -> partial[Tensor] | None:
    """The forward that replaces a layer's own; None to keep it."""
    if isinstance(layer, nn.Linear):
        return partial(_linear, layer, cast)
    if isinstance(layer, nn.Conv2d):
        return partial(_convolution, layer, cast)
    return partial(_embedding, layer) if isinstance(layer, nn.Embedding) else None


def compute_in_stored_dtype(module: nn.Module) -> None:
    """Undo `compute_in_fp32`: layers compute in the dtype of their weights. Quantised ones compute in that of their
    input, as before."""
    for layer in module.modules():
        forward = layer.__dict__.get("forward")
        is_ours = isinstance(forward, partial) and forward.func in (_linear, _convolution, _embedding)
        if is_ours and not isinstance(layer.weight, PackedWeight):
            del layer.forward


def _linear(layer: nn.Linear, cast: Cast, x: Tensor) -> Tensor:
    x, bias, is_plain = _under_autocast(layer, x)
    if is_plain:
        return F.linear(x, layer.weight, layer.bias)
    result: Tensor = _Linear.apply(x, layer.weight, bias, cast)  # type: ignore[no-untyped-call]
    return result


def _convolution(layer: nn.Conv2d, cast: Cast, x: Tensor) -> Tensor:
    x, bias, is_plain = _under_autocast(layer, x)
    if is_plain:
        plain: Tensor = layer._conv_forward(x, layer.weight, layer.bias)
        return plain
    way = (layer.stride, layer.padding, layer.dilation, layer.groups)
    result: Tensor = _Convolution.apply(x, layer.weight, bias, cast, way)  # type: ignore[no-untyped-call]
    return result


def _under_autocast(layer: nn.Linear | nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor | None, bool]:
    """Input and bias in the dtype to compute in, and whether torch's own function computes: under autocast, unless the
    weight is quantised, as torch would keep the dense weight for the backward pass."""
    bias = layer.bias
    if not torch.is_autocast_enabled(x.device.type):
        return x, bias, False
    if not isinstance(layer.weight, PackedWeight):
        return x, bias, True
    x = x.to(torch.get_autocast_dtype(x.device.type))
    return x, None if bias is None else bias.to(x.dtype), False


def _embedding(layer: nn.Embedding, ids: Tensor) -> Tensor:
    return F.embedding(ids, layer.weight, layer.padding_idx).float()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, cast: Cast) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.cast = cast
        return F.linear(x, cast(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        back = gradient @ ctx.cast(weight, gradient.dtype) if ctx.needs_input_grad[0] else None
        return back, None, None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, cast: Cast, way: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.cast, ctx.way, ctx.shape = cast, way, x.shape
        return F.conv2d(x, cast(weight, x.dtype), bias, *way)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        (weight,) = ctx.saved_tensors
        inner = ctx.cast(weight, gradient.dtype)
        back = conv2d_input(ctx.shape, inner, gradient, *ctx.way)  # type: ignore[no-untyped-call]
        return back, None, None, None, None
