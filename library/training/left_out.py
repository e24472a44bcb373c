"""Samples whose files cannot be read during a run: they are left out. Too many of them end the run (saving/rescue.py).

A step is the mean over the samples that were read. A window in which nothing was read counts as a step, but leaves
weights, optimizer and schedule as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from library.data.batch import Unread
from library.data.retries import Unreadable
from library.messages import counted, listed
from library.options.mistakes import Mistake

if TYPE_CHECKING:
    from library.runtime.processes import Processes

MOST_IMAGES = 0.1  # share of the images that may be left out; one image always may
IN_A_ROW = 10  # samples that could not be read, one after the other, end a run


@dataclass
class LeftOut:
    """Counts the samples that could not be read, and stops the run if they are too many.

    `images` is the number of images that are trained on. `nothing_read`: whether no sample of the last window was read.
    """

    images: int
    processes: Processes
    say: Callable[[str], None]
    nothing_read: bool = False
    samples: int = 0
    paths: set[str] = field(default_factory=set)
    _in_a_row: int = 0
    _position: int = -1  # of the last one

    def count(self, unread: Sequence[Unread], window_samples: int, step: int, *, anywhere: int | None = None) -> int:
        """Count and name the samples of a window that this process could not read, and those of other ranks; where
        their number is known to all ranks, it is `anywhere`. Returns how many samples of the window were read. All
        ranks must call. Raises Unreadable if too many were not."""
        if anywhere == 0:
            self.nothing_read = False
            return window_samples
        longest = 0
        found = sorted(sample for of_rank in self.processes.gather(tuple(unread)) for sample in of_rank)
        for sample in found:
            self.say(f"step {step}: sample left out: {sample.reason}")
            self._in_a_row = self._in_a_row + 1 if sample.position == self._position + 1 else 1
            self._position = sample.position
            longest = max(longest, self._in_a_row)
        self.samples += len(found)
        self.paths.update(sample.path for sample in found)
        self.nothing_read = len(found) == window_samples
        if found and len(self.paths) > max(1, self.images * MOST_IMAGES):
            share = f"{len(self.paths)} of {counted(self.images, 'image')}"
            raise self._unreadable(f"{share} could not be read, more than {MOST_IMAGES:.0%}")
        if longest >= IN_A_ROW:
            raise self._unreadable(f"{longest} samples in a row could not be read")
        return window_samples - len(found)

    def report(self) -> None:
        """At the end of the run, say how many samples were left out, if any."""
        if self.samples:
            of_images = f"{counted(self.samples, 'sample')} of {counted(len(self.paths), 'image')}"
            self.say(f"left out, as they could not be read: {of_images} ({listed(sorted(self.paths), 5)})")

    def _unreadable(self, what: str) -> Unreadable:
        return Unreadable([Mistake(f"{what}: {listed(sorted(self.paths), 5)}", "make the files readable again")])
