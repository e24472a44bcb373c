"""The element-wise loss: squared, absolute, or pseudo-Huber (squared near 0 and absolute far from it).

With d = output - target and c the threshold of the sample (arXiv 2403.16728, in kohya's scaling):

    huber       2 c (sqrt(d^2 + c^2) - c)    about d^2 for |d| << c, about 2 c |d| for |d| >> c
    smooth_l1   2   (sqrt(d^2 + c^2) - c)    about d^2 / c         , about 2 |d|

    constant      c = huber_c * scale
    exponential   c = huber_c^(t / T) * scale                                      (from 1 at t = 0 to huber_c)
    snr           c = ((1 - huber_c) / (1 + s_t / a_t)^2 + huber_c) * scale        (from nearly 1 to huber_c)

torch's Huber losses are piecewise, and half of these near 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from library.objective.process import ForwardProcess, require_snr
from library.runtime.transfers import upload

if TYPE_CHECKING:
    from library.options.groups.objective import ObjectiveOptions

Kind = Literal["l1", "l2", "huber", "smooth_l1"]
Schedule = Literal["constant", "exponential", "snr"]


@dataclass(frozen=True)
class ElementLoss:
    """The element-wise loss rho(d). The threshold is used by huber and smooth_l1 only."""

    kind: Kind = "l2"
    schedule: Schedule = "snr"
    threshold: float = 0.1
    scale: float = 1.0

    @classmethod
    def from_options(cls, options: ObjectiveOptions) -> ElementLoss:
        """The loss of the options. Raises ValueError for an unknown name."""
        kinds: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}
        schedules: dict[str, Schedule] = {schedule: schedule for schedule in get_args(Schedule)}
        if options.loss_type not in kinds or options.huber_schedule not in schedules:
            raise ValueError(f"unknown loss {options.loss_type!r} or schedule {options.huber_schedule!r}")
        return cls(kinds[options.loss_type], schedules[options.huber_schedule], options.huber_c, options.huber_scale)

    @property
    def needs_snr(self) -> bool:
        """Whether the process must have an SNR."""
        return self.kind in ("huber", "smooth_l1") and self.schedule == "snr"

    def at(
        self, process: ForwardProcess, timesteps: Tensor, device: torch.device | None = None
    ) -> Callable[[Tensor], Tensor]:
        """rho at these timesteps (B,): a function of d (B, ...) float32 on `device`, which returns the same shape."""
        if self.kind == "l2":
            return torch.square
        if self.kind == "l1":
            return torch.abs
        c = upload(self.thresholds(process, timesteps), device or timesteps.device)
        return lambda d: self._pseudo_huber(d, c.view(-1, *(1,) * (d.dim() - 1)))

    def thresholds(self, process: ForwardProcess, timesteps: Tensor) -> Tensor:
        """c of each sample: (B,) float32, on the device of `timesteps`.

        Raises ValueError for the schedule "snr" with a process that has no SNR.
        """
        if self.schedule == "constant":
            c = torch.full(timesteps.shape, self.threshold, dtype=torch.float64, device=timesteps.device)
        elif self.schedule == "exponential":
            c = self.threshold ** (timesteps.double() / process.timesteps)
        else:
            shares = require_snr(process, "the threshold schedule snr")
            signal, level = shares.signal(timesteps).double(), shares.noise(timesteps).double()
            # equals 1 / (1 + s / a), but is defined for a = 0
            c = (1.0 - self.threshold) * (signal / (signal + level)).square() + self.threshold
        return (c * self.scale).float()

    def _pseudo_huber(self, d: Tensor, c: Tensor) -> Tensor:
        # sqrt(d^2 + c^2) - c without cancellation
        distance = d.square() / (torch.hypot(d, c) + c)
        return 2.0 * c * distance if self.kind == "huber" else 2.0 * distance


SQUARED = ElementLoss()
