"""Pyramid (multi-resolution) noise: white noise plus coarser noise, enlarged to the size of the sample.

The method is known from a blog post by J. Whitaker on multi-resolution noise and as kohya's --multires_noise_*; there
is no paper. Two scalings:

"sample"  n' = (n + sum_i d^i u_i) / sqrt(1 + sum_i d^(2i)), i = 1 .. as many as asked for. Each side of u_i is that
          of u_(i-1) divided by a random r in [2, 4), u_i = the bilinear enlargement of white noise, divided by its
          standard deviation at each place. So every value of n' has variance 1, whatever else is in the batch.
"batch"   as sd-scripts: levels i = 0 .. one less than asked for, of side / r^i with a fresh r each, enlarged as they
          are, and the result divided by the standard deviation over the whole batch.

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
    """`levels` scales, the i-th with the factor `discount` ** i; `scaling` as above."""

    levels: int
    discount: float
    scaling: Literal["sample", "batch"] = "sample"

    @classmethod
    def from_options(cls, options: ObjectiveOptions) -> Pyramid | None:
        """The pyramid that the options ask for; None where they ask for none."""
        if not options.multires_noise_iterations:
            return None
        scaling: Literal["sample", "batch"] = "batch" if options.multires_noise_scaling == "batch" else "sample"
        return cls(options.multires_noise_iterations, options.multires_noise_discount, scaling)

    def add(self, noise: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """`noise` (B, C, h, w) float32 on the CPU with coarser noise in it, each sample by its own generator."""
        if self.scaling == "sample":
            return torch.stack(
                [self._widened(one, generator) for one, generator in zip(noise, generators, strict=True)]
            )
        rough = torch.stack(
            [self._as_sd_scripts(one, generator) for one, generator in zip(noise, generators, strict=True)]
        )
        return rough / rough.std()

    def _widened(self, noise: Tensor, generator: torch.Generator) -> Tensor:
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
    """The standard deviation of each of `long` values interpolated between `short` independent ones of deviation 1:
    (long,) float32. It is 1 on one of these and less between them."""
    matrix = interpolate(torch.eye(short)[None], size=long, mode="linear")[0]
    return matrix.square().sum(0).sqrt()


def _shrink(generator: torch.Generator) -> float:
    """r: uniform in [2, 4)."""
    return 2.0 + 2.0 * float(torch.rand((), generator=generator))
