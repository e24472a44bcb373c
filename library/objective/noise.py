"""The noise that is added to a sample, and its shaping.

Each sample draws from its own generator on the CPU, so its noise does not depend on the device, on the number of
processes, or on which samples share its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator], offset: float = 0.0) -> Tensor:
    """Standard normal noise of one sample's `shape` (C, ...) for each generator: (B, C, ...) float32, CPU.

    With `offset` each channel of each sample is shifted by offset * z, z ~ N(0, 1)   (Cross Labs, "Diffusion with
    offset noise"): the variance of a channel's mean grows by offset**2. The noise itself is drawn first, so a sample
    keeps it when the offset is switched on.
    """
    return torch.stack([_sample_noise(shape, generator, offset) for generator in generators])


def _sample_noise(shape: Sequence[int], generator: torch.Generator, offset: float) -> Tensor:
    noise = torch.randn(tuple(shape), generator=generator)
    if offset:
        per_channel = (shape[0],) + (1,) * (len(shape) - 1)
        noise = noise + offset * torch.randn(per_channel, generator=generator)
    return noise
