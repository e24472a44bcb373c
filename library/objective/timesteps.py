"""Which timestep each sample is trained at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_timesteps(generators: Sequence[torch.Generator], low: int, high: int) -> Tensor:
    """Uniform integers in the half-open range [low, high), one from each sample's own generator: (B,) int64, CPU.

    Raises ValueError for an empty range or one below 0.
    """
    if not 0 <= low < high:
        raise ValueError(f"timesteps are drawn from low <= t < high with low >= 0, not from [{low}, {high})")
    return torch.stack([torch.randint(low, high, (), generator=generator) for generator in generators])
