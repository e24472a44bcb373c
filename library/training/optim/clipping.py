"""Gradient clipping by the global norm, and scaling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def norm_of_gradients(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """The global 2-norm of the parameters' gradients, a scalar on their device; None if there are none."""
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
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)


def scale_gradients(parameters: Sequence[nn.Parameter], factor: float) -> None:
    """Multiply all gradients by `factor`. A factor of 1 is skipped, since it would read and write every gradient."""
    if factor == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The global 2-norm of the gradients, a scalar on their device.

    On the CPU it is computed row by row: torch's norm of a whole tensor uses one core there, and adding millions of
    squares in one float32 loses digits.
    """
    norm: Tensor
    if gradients[0].device.type != "cpu":
        norm = torch.nn.utils.get_total_norm(gradients)
        return norm
    rows = [gradient.flatten(1) if gradient.dim() > 1 else gradient for gradient in gradients]
    norms = [torch.linalg.vector_norm(row, dim=-1, dtype=torch.float32).flatten() for row in rows]
    norm = torch.linalg.vector_norm(torch.cat(norms))
    return norm
