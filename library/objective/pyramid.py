"""Pyramid (multi-resolution) noise: white noise plus coarser noise, upsampled to the size of the sample.

The method comes from a blog post by J. Whitaker on multi-resolution noise and kohya's --multires_noise_*; there is no
paper. Two scalings:

"sample"  n' = (n + sum_i d^i u_i) / sqrt(1 + sum_i d^(2i)), i = 1 .. levels. Each side of u_i is that of u_(i-1)
          divided by a random r in [2, 4), u_i = bilinearly upsampled white noise, divided by its standard deviation at
          each position. So every value of n' has variance 1, independent of the batch.
"batch"   as in sd-scripts: i = 0 .. levels - 1, of side / r^i with a new r each, upsampled without normalisation, and
          the result divided by the standard deviation over the whole batch.

The last level is the first one with a side of 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

if TYPE_CHECKING:
    from library.options.groups.objective import ObjectiveOptions


@dataclass(frozen=True)
class Pyramid:
    """Up to `levels` levels, the i-th with the factor `discount` ** i; `scaling` as above."""

    levels: int
    discount: float
    scaling: Literal["sample", "batch"] = "sample"

    @classmethod
    def from_options(cls, options: ObjectiveOptions) -> Pyramid | None:
        """The pyramid noise of the options; None if disabled."""
        if not options.multires_noise_iterations:
            return None
        scaling: Literal["sample", "batch"] = "batch" if options.multires_noise_scaling == "batch" else "sample"
        return cls(options.multires_noise_iterations, options.multires_noise_discount, scaling)

    def add(self, noise: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """`noise` (B, C, h, w) float32 on the CPU plus coarser noise, each sample from its own generator."""
        pairs = zip(noise, generators, strict=True)
        if self.scaling == "sample":
            return torch.stack([self._normalised(sample, generator) for sample, generator in pairs])
        total = torch.stack([self._as_sd_scripts(sample, generator) for sample, generator in pairs])
        return total / total.std()

    def _normalised(self, noise: Tensor, generator: torch.Generator) -> Tensor:
        """One sample (C, h, w) with the coarser levels, of variance 1."""
        channels, height, width = noise.shape
        total, variance = noise, 1.0
        tall, wide = float(height), float(width)
        for level in range(1, self.levels + 1):
            shrink = _shrink(generator)
            tall, wide = tall / shrink, wide / shrink
            rows, columns = max(1, math.floor(tall)), max(1, math.floor(wide))
            white = torch.randn((1, channels, rows, columns), generator=generator)
            deviation = deviations(rows, height)[:, None] * deviations(columns, width)
            total = total + self.discount**level * interpolate(white, (height, width), mode="bilinear")[0] / deviation
            variance += self.discount ** (2 * level)
            if rows == 1 or columns == 1:
                break
        return total / math.sqrt(variance)

    def _as_sd_scripts(self, noise: Tensor, generator: torch.Generator) -> Tensor:
        """One sample (C, h, w) with the levels of sd-scripts, not scaled yet."""
        channels, height, width = noise.shape
        total = noise
        for level in range(self.levels):
            shrink = _shrink(generator) ** level
            rows, columns = max(1, int(height / shrink)), max(1, int(width / shrink))
            white = torch.randn((1, channels, rows, columns), generator=generator)
            total = total + self.discount**level * interpolate(white, (height, width), mode="bilinear")[0]
            if rows == 1 or columns == 1:
                break
        return total


def deviations(short: int, long: int) -> Tensor:
    """The standard deviation of `long` values interpolated from `short` independent ones of deviation 1: (long,)
    float32. It is 1 at one of these and lower between them."""
    matrix = interpolate(torch.eye(short)[None], size=long, mode="linear")[0]
    return matrix.square().sum(0).sqrt()


def _shrink(generator: torch.Generator) -> float:
    """r: uniform in [2, 4)."""
    return 2.0 + 2.0 * float(torch.rand((), generator=generator))
