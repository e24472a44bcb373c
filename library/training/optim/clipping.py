"""Gradient clipping by the global norm, and scaling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn


def norm_of_gradients(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """The global 2-norm of the parameters' gradients, a scalar on their device; None if there are none. That of shards
    is the norm of the whole tensors: all processes must call."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return gradient_norm(gradients) if gradients else None


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float, norm: Tensor | None = None) -> None:
    """Scale all gradients by min(1, limit / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ does. `norm`: their
    global norm, where it is known.

    On the CPU a factor of 1 is skipped, since applying it would read and write every gradient. On other devices it is
    applied, since reading the norm would wait for the device.
    """
    norm = norm_of_gradients(parameters) if norm is None else norm
    if norm is None:
        return
    if norm.device.type == "cpu" and float(norm) + 1e-6 <= limit:
        return
    shards = [shard for parameter in parameters if (shard := _shard(parameter.grad)) is not None]
    for shard in shards:
        shard.mul_((limit / (norm + 1e-6)).clamp(max=1))
    if not shards:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)


def scale_gradients(parameters: Sequence[nn.Parameter], factor: float) -> None:
    """Multiply all gradients by `factor`. A factor of 1 is skipped, since it would read and write every gradient."""
    if factor == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The global 2-norm of the gradients, a scalar on their device.

    On the CPU it is computed row by row: torch's norm of a whole tensor uses one core there, and adding millions of
    squares in one float32 loses digits.
    """
    if _shard(gradients[0]) is not None:
        parts = [shard for gradient in gradients if (shard := _shard(gradient)) is not None]
        squares = gradient_norm([part for part in parts if part.numel()] or parts[:1]).square()
        torch.distributed.all_reduce(squares)
        return squares.sqrt()
    if gradients[0].device.type != "cpu":
        return joined_norm(_norms(gradients))
    return joined_norm([norms_of(gradient) for gradient in gradients])


def norms_of(gradient: Tensor) -> Tensor:
    """Norms of parts of a gradient, float32: of its rows on the CPU, elsewhere of the whole."""
    if gradient.device.type != "cpu":
        return _norms([gradient])[0]
    rows = gradient.flatten(1) if gradient.dim() > 1 else gradient
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32).flatten()
    return norms


def joined_norm(norms: Sequence[Tensor]) -> Tensor:
    """The global norm of what has these `norms_of`, a scalar."""
    norm: Tensor = torch.linalg.vector_norm(torch.cat([norm.reshape(-1) for norm in norms]))
    return norm


def _norms(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """The norm of each gradient by as few kernels as possible, float32: torch's get_total_norm rounds those of bfloat16
    gradients to bfloat16."""
    foreach: Any = torch._foreach_norm
    norms: Sequence[Tensor] = foreach([*gradients], 2, dtype=torch.float32)
    return norms


def _shard(gradient: Any) -> Tensor | None:
    """The part of a sharded gradient that this process has; None for a whole one."""
    part: Tensor | None = gradient.to_local() if hasattr(gradient, "to_local") else None
    return part
