"""A Linear layer with its LoRA in one autograd function, with as few passes over memory as possible.

Plain autograd computes the adapter's part of the output and of the input's gradient separately and adds them in extra
passes. Here the matrix products accumulate both, and the input is saved once. A base weight of another dtype is cast
for each product and the cast is not saved, so a base in half precision takes half the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Cast = Callable[[Tensor, torch.dtype], Tensor]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 - autograd hands tensors in one by one
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float, cast: Cast
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        matrix = cast(weight, rows.dtype)
        out = rows @ matrix.mT if bias is None else torch.addmm(bias.to(rows.dtype), rows, matrix.mT)
        # (r, n): CPUs are faster with long rows
        ranks = (down @ rows.to(down.dtype).mT).mul_(scale)
        if down.dtype == out.dtype:
            out.addmm_(ranks.mT, up.mT)
        else:
            out.add_(ranks.mT @ up.mT)
        kept = rows if ctx.needs_input_grad[3] else None  # LoRA-FA, whose A is frozen, needs no input
        ctx.save_for_backward(kept, ranks, weight, down, up)
        ctx.scale, ctx.shape, ctx.cast = scale, x.shape, cast
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, ranks, weight, down, up = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        mine = grad.to(up.dtype)
        by_rank = (mine @ up).mul_(ctx.scale)
        by_up = (ranks @ mine).mT if ctx.needs_input_grad[4] else None
        by_down = by_rank.mT @ rows.to(down.dtype) if ctx.needs_input_grad[3] else None
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = grad @ ctx.cast(weight, grad.dtype)
            if down.dtype == by_x.dtype:
                by_x.addmm_(by_rank, down)
            else:
                by_x.add_(by_rank @ down)
            by_x = by_x.view(ctx.shape)
        return by_x, None, None, by_down, by_up, None, None


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    cast: Cast = Tensor.to,
) -> Tensor | None:
    """x · (W + scale · B A)ᵀ + bias for x (..., in); only x, A (r, in) and B (out, r) get gradients.

    `cast` converts the weight to the dtype of the product; its result is not saved. Under autocast everything is
    computed in autocast's dtype, else W's part in x's dtype and the adapter's in its own. None if this would differ
    from the layer's arithmetic: W or bias needs a gradient, or there is float64, which autocast does not touch.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    if torch.is_autocast_enabled(x.device.type):
        if torch.float64 in (x.dtype, weight.dtype, down.dtype):
            return None
        dtype = torch.get_autocast_dtype(x.device.type)
        x, down, up = x.to(dtype), down.to(dtype), up.to(dtype)
    result: Tensor = _LoraLinear.apply(x, weight, bias, down, up, scale, cast)  # type: ignore[no-untyped-call]
    return result
