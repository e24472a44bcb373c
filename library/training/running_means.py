"""Means of the losses of an epoch, without adding all of them at every step.

Sums are exact fractions, so a mean is that of `math.fsum` over all values, bit for bit, however long the epoch is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction


@dataclass
class RunningSum:
    """The exact sum of the first values of a list that grows at its end. Another list is added up anew."""

    _values: Sequence[float] = ()
    _count: int = 0
    _sum: Fraction = Fraction(0)

    def of(self, values: Sequence[float], count: int) -> Fraction:
        """The sum of the first `count` values. Raises ValueError or OverflowError for one that is not finite."""
        if values is not self._values or count < self._count:
            self._values, self._count, self._sum = values, 0, Fraction(0)
        for value in values[self._count : count]:
            self._sum += Fraction(value)
        self._count = count
        return self._sum


@dataclass
class RunningMeans:
    """The means of the losses of this epoch (`now`), of which there are more each time, and of the one before it."""

    _now: RunningSum = field(default_factory=RunningSum)
    _before: RunningSum = field(default_factory=RunningSum)
    _passed: RunningSum = field(default_factory=RunningSum)

    def of_epoch(self, now: Sequence[float]) -> float:
        """The mean of the epoch so far; NaN of no values."""
        return float(self._now.of(now, len(now))) / len(now) if now else math.nan

    def moving(self, now: Sequence[float], before: Sequence[float]) -> float:
        """The mean over as many steps as the epoch before had, of which the last were in this one."""
        count = len(now)
        if count >= len(before):
            return self.of_epoch(now)
        left = self._before.of(before, len(before)) - self._passed.of(before, count)
        return float(self._now.of(now, count) + left) / len(before)
