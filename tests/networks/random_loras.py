"""LoRA layers and files with random numbers, for the tests of the tools' tensor maths."""

from __future__ import annotations

import torch
from torch import Tensor

from networks.arithmetic.factors import Factors

LINEAR, POINT, KERNEL = (24, 18), (24, 18, 1, 1), (16, 12, 3, 3)


def layer(
    shape: tuple[int, ...], rank: int, alpha: float, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Factors:
    """A layer of a weight of `shape`."""
    draw = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=draw, dtype=torch.float64)
    up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=draw, dtype=torch.float64)
    return Factors(down.to(dtype), up.to(dtype), alpha)


def delta(tensors: dict[str, Tensor], name: str) -> Tensor:
    """ΔW of a file's layer in float64, written out: alpha / rank times the sum over ranks of up and down."""
    down, up = (tensors[f"{name}.lora_{word}.weight"].double() for word in ("down", "up"))
    scale = float(tensors[f"{name}.alpha"]) / down.shape[0] if f"{name}.alpha" in tensors else 1.0
    return scale * torch.einsum("or,r...->o...", up.flatten(1), down)


def relative(found: Tensor, expected: Tensor) -> float:
    """The distance of two tensors over the norm of the expected one."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
