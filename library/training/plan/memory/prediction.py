"""The predicted memory of a run: its moments, each with its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """A moment of a run: what is on the device then, in bytes, by title."""

    title: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Prediction:
    """The moments of a run that need the most memory. `context`: bytes that are taken besides, by the driver and
    libraries; `spare`: share of a card's memory that is left for fragmentation."""

    moments: tuple[Moment, ...]
    context: int
    spare: float

    @property
    def largest(self) -> Moment:
        """The moment of the peak."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def peak(self) -> int:
        """Bytes allocated at the peak: torch.cuda.max_memory_allocated."""
        return self.largest.total

    @property
    def needed(self) -> int:
        """Bytes of a card that is large enough: the peak, the context, and what is left for fragmentation."""
        return round((self.peak + self.context) / (1 - self.spare))
