"""A value over steps: kept whole, shown in as many points as a screen can tell apart."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from dataclasses import dataclass, field

MOST_POINTS = 1000


@dataclass(frozen=True)
class Points:
    """A curve to draw. Each point stands for the values up to its step: their mean, least and greatest."""

    steps: list[int]
    means: list[float]
    lows: list[float]
    highs: list[float]

    def add(self, step: int, values: array[float]) -> None:
        """Add a point, for the values up to `step`. Six digits are kept: more cannot be seen."""
        self.steps.append(step)
        for found, value in (
            (self.means, math.fsum(values) / len(values)),
            (self.lows, min(values)),
            (self.highs, max(values)),
        ):
            found.append(float(f"{value:.6g}"))


@dataclass
class Curve:
    """A value by step, in rising steps. Values that are not finite are not drawn; their steps are kept."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))
    not_finite: array[int] = field(default_factory=lambda: array("q"))
    _size: int = 1  # values that a point stands for
    _points: Points = field(default_factory=lambda: Points([], [], [], []))  # those that are complete

    def append(self, step: int, value: float) -> None:
        """Add the value of a step. It replaces one of the same step, and takes back those of later steps."""
        if self.steps and self.steps[-1] >= step:
            self.rewind(step - 1)
        if not math.isfinite(value):
            self.not_finite.append(step)
            return
        self.steps.append(step)
        self.values.append(value)

    def rewind(self, step: int) -> None:
        """Forget the values after `step`."""
        del self.not_finite[bisect_right(self.not_finite, step) :]
        kept = bisect_right(self.steps, step)
        if kept < len(self.steps):
            del self.steps[kept:], self.values[kept:]
            self._points = Points([], [], [], [])

    def thinned(self, most: int = MOST_POINTS) -> Points:
        """The curve in at most `most` points. Each stands for a power of two of values, so that while a curve grows its
        points stay as they are until their number has doubled."""
        size = 1
        while len(self.steps) > size * most:
            size *= 2
        if size != self._size:
            self._size, self._points = size, Points([], [], [], [])
        done = self._points
        while (start := len(done.steps) * size) + size <= len(self.steps):
            done.add(self.steps[start + size - 1], self.values[start : start + size])
        last = Points([*done.steps], [*done.means], [*done.lows], [*done.highs])
        if start < len(self.steps):
            last.add(self.steps[-1], self.values[start:])
        return last
