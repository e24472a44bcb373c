"""Draw the timestep of each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from library.options.groups.objective import ObjectiveOptions


def draw_timesteps(generators: Sequence[torch.Generator], low: int, high: int) -> Tensor:
    """Uniform integers in the half-open range [low, high), one from each sample's own generator: (B,) int64, CPU.

    Raises ValueError for an empty range or one below 0.
    """
    if not 0 <= low < high:
        raise ValueError(f"timesteps are drawn from low <= t < high with low >= 0, not from [{low}, {high})")
    return torch.stack([torch.randint(low, high, (), generator=generator) for generator in generators])


@dataclass(frozen=True)
class TimestepBias:
    """Timesteps in [begin, end) are drawn `multiplier` times as often as each of the others.

    p(t) is proportional to `multiplier` there and to 1 elsewhere (the strategies of diffusers' text-to-image scripts).
    In expectation that is the same as uniform timesteps with the loss weight p(t) * (high - low); the variance differs.
    """

    begin: int
    end: int
    multiplier: float

    @classmethod
    def from_options(cls, options: ObjectiveOptions, low: int, high: int) -> TimestepBias | None:
        """The bias of the options within [low, high); None if it has no effect.

        "earlier" and "later" are the lowest and the highest timesteps, `timestep_bias_portion` of those in
        [low, high), rounded down; "range" is [timestep_bias_begin, timestep_bias_end) within [low, high).
        """
        begin, end = low, high
        count = int(options.timestep_bias_portion * (high - low))
        if options.timestep_bias_strategy == "earlier":
            end = low + count
        elif options.timestep_bias_strategy == "later":
            begin = high - count
        elif options.timestep_bias_strategy == "range":
            begin, end = max(low, options.timestep_bias_begin), min(high, options.timestep_bias_end)
        if begin >= end or (begin, end) == (low, high) or options.timestep_bias_multiplier == 1.0:
            return None
        return cls(begin, end, options.timestep_bias_multiplier)

    def probabilities(self, low: int, high: int) -> Tensor:
        """p(t) of the timesteps low .. high - 1: (high - low,) float64, sum 1."""
        weights = torch.ones(high - low, dtype=torch.float64)
        weights[max(0, self.begin - low) : max(0, self.end - low)] = self.multiplier
        return weights / weights.sum()

    def draw(self, generators: Sequence[torch.Generator], low: int, high: int) -> Tensor:
        """Integers in [low, high) with these probabilities, one from each generator: (B,) int64, CPU."""
        cumulative = self.probabilities(low, high).cumsum(0)
        uniform = [torch.rand((), dtype=torch.float64, generator=generator) for generator in generators]
        offsets = torch.searchsorted(cumulative, torch.stack(uniform) * cumulative[-1], right=True)
        # rounding may give the sum itself
        return low + offsets.clamp(max=high - low - 1)
