"""Scheduled sampling: which samples are rolled, how far, and what noise they have where they arrive. Pure maths.

A model is trained on x_t = forward(x0, n, t), but it draws from what it made of a noisier x itself (exposure bias,
arXiv 1506.03099, 2308.15321). A rolled sample begins k strides of D timesteps above its own timestep t, and goes down
to t in k steps of a sampler, with the model's own predictions. With perfect predictions it arrives at x_t, otherwise at
some x', which is on the path from x0 to the noise n':

    n' = (x' - a_t x0) / s_t        (flow, with noise level f: (x' - (1 - f) x0) / f)

The corrected target is that of n', the answer that leads from x' to x0. The original target is that of n.

    D     1 (stride "training") or round(T / N) for images drawn in N steps ("inference")
    k     1 + floor(K w), w = u ("uniform"), u^2 ("biased_early"), 1 - u^2 ("biased_late"); u uniform in [0, 1)
    p(m)  the share of samples that are rolled after m steps: 0 before the start step m0, then
          p0 + (p1 - p0) shape(min(1, (m - m0) / R)); shape: v, or (1 - cos(pi v)) / 2; p1 at once for R = 0

An error of the prediction on the way moves the corrected target by `gain` times that error. At low t this is more than
the error itself. So k is lowered until |gain| <= 1, and until the rollout begins at a timestep that is trained. A
sample for which no k is left is not rolled.

torch is imported inside functions only: the plan uses the shares and lengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.messages import counted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.objective.process import ForwardProcess, Prediction
    from library.options.groups.rollout import RampShape, RolloutOptions, RolloutSampler, Strategy


@dataclass(frozen=True)
class RolloutSettings:
    """How samples are rolled: over up to `longest` steps (K) of `stride` timesteps (D), with the ramp p0 = `first` to
    p1 = `last` over `ramp_steps` optimizer steps from `start_step` on. `corrected`: which target they have."""

    longest: int
    last: float
    stride: int = 1
    first: float = 0.0
    ramp_steps: int = 0
    start_step: int = 0
    shape: RampShape = "linear"
    strategy: Strategy = "uniform"
    sampler: RolloutSampler = "unipc"
    corrected: bool = True

    @classmethod
    def from_options(cls, options: RolloutOptions, timesteps: int) -> RolloutSettings | None:
        """The settings for a process of this many timesteps, or None if no sample is ever rolled."""
        ramp, end = options.scheduled_sampling_ramp_steps, options.scheduled_sampling_prob_end
        share = options.scheduled_sampling_probability
        last = end if ramp and end is not None else share
        first = options.scheduled_sampling_prob_start if ramp else last
        if not options.scheduled_sampling_max_step_offset or not (first or last):
            return None
        by_inference = options.scheduled_sampling_stride == "inference"
        return cls(
            longest=options.scheduled_sampling_max_step_offset,
            last=last,
            stride=max(1, round(timesteps / options.scheduled_sampling_inference_steps)) if by_inference else 1,
            first=first,
            ramp_steps=ramp,
            start_step=options.scheduled_sampling_start_step,
            shape=options.scheduled_sampling_ramp_shape,
            strategy=options.scheduled_sampling_strategy,
            sampler=options.scheduled_sampling_sampler,
            corrected=options.scheduled_sampling_target == "corrected",
        )

    def probability(self, step: int) -> float:
        """p(m) after `step` finished optimizer steps."""
        since = step - self.start_step
        if since < 0:
            return 0.0
        if since >= self.ramp_steps:
            return self.last
        v = since / self.ramp_steps
        return self.first + (self.last - self.first) * (
            v if self.shape == "linear" else (1 - math.cos(math.pi * v)) / 2
        )

    def length(self, u: float) -> int:
        """k of a number `u` in [0, 1)."""
        w = {"uniform": u, "biased_early": u * u, "biased_late": 1 - u * u}[self.strategy]
        return min(self.longest, 1 + math.floor(self.longest * w))

    @property
    def mean_length(self) -> float:
        """The expectation of k: the sum over j < K of the probability of K w >= j."""
        shares = [j / self.longest for j in range(self.longest)]
        if self.strategy == "uniform":
            return (self.longest + 1) / 2
        return sum(
            1 - math.sqrt(share) if self.strategy == "biased_early" else math.sqrt(1 - share) for share in shares
        )

    def passes_per_sample(self, steps: int) -> float:
        """Forward passes that a run of this many optimizer steps adds for each sample, on average; a little more than
        there are, since some rollouts are shortened."""
        return self.mean_length * math.fsum(map(self.probability, range(steps))) / steps

    def draw(self, step: int, generators: Sequence[torch.Generator]) -> Tensor:
        """k of each sample, 0 if it is not rolled: (B,) int64, CPU. Each generator draws a coin and a length, always
        both, so that the share does not change the lengths."""
        import torch

        draws = torch.stack([torch.rand(2, dtype=torch.float64, generator=generator) for generator in generators])
        share = self.probability(step)
        return torch.tensor([self.length(u) if coin < share else 0 for coin, u in draws.tolist()])

    def longest_from(self, process: ForwardProcess, prediction: Prediction, high: int) -> Tensor:
        """The largest k at each timestep below `high`, the end of those that are trained: (high,) int64, CPU."""
        import torch

        t = torch.arange(high)
        longest = torch.zeros_like(t)
        for k in range(1, self.longest + 1):
            source = t + k * self.stride
            allowed = (source < high) & (longest == k - 1)
            allowed &= gain(process, prediction, t, source.clamp(max=high - 1)).abs() <= 1
            longest[allowed] = k
        return longest

    def describe(self, steps: int) -> str:
        """A line of the plan of a run of this many steps."""
        unit = counted(self.stride, "timestep")
        length = f"1 to {self.longest} steps of {unit} ({self.strategy})" if self.longest > 1 else f"1 step of {unit}"
        target = "corrected" if self.corrected else "original"
        return f"rollout of {self._share(steps)} of the samples over {length} with {self.sampler}, {target} target"

    def _share(self, steps: int) -> str:
        """`50%`, or `0% to 50% (linear until step 1000)`."""
        if not self.ramp_steps:
            return f"{self.last:.0%}" + (f" (after step {self.start_step})" if self.start_step else "")
        end, begin = self.start_step + self.ramp_steps, self.start_step
        reached = "" if end <= steps else f", {self.probability(steps):.0%} at the end of this run"
        return f"{self.first:.0%} to {self.last:.0%} ({self.shape} from step {begin} to {end}{reached})"


def gain(process: ForwardProcess, prediction: Prediction, t: Tensor, source: Tensor) -> Tensor:
    """By how much an error of 1 in the prediction moves the corrected target, in one step from the timestep `source`
    down to `t`, both (B,) int64: (B,) float32.

    Everything is linear in the prediction, so it is enough to follow an error of 1 from x0 = 0 without noise.
    """
    import torch

    nothing = torch.zeros(t.shape)
    arrived = process.step(nothing, torch.ones(t.shape), source, t, prediction)
    return process.target(nothing, process.implied_noise(nothing, arrived, t), t, prediction)
