"""Compare the memory of a run with its prediction, and notice a card that has run full."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

from library.messages import readable_bytes
from library.runtime.accelerator import peak_bytes

if TYPE_CHECKING:
    from library.runtime.device import Machine
    from library.training.plan.memory.prediction import Prediction
    from library.training.run import Run
    from library.training.saving.state import Progress

TOLERANCE = 0.1  # by which peak and prediction may differ unsaid
SLOWER = 3  # times the median of the first steps
FULL = 0.9  # share of the card from which on slow steps are blamed on its memory
STEPS = 10  # over which a median is taken


@dataclass
class MemoryWatch:
    """Called after steps. `predicted`: the peak of what has happened by then, in bytes, None if it is not known;
    `size`: the memory of the card; `peak`: what torch counted so far, None where it counts nothing."""

    predicted: int | None
    size: int | None
    peak: Callable[[], int | None]
    warn: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    _compared: bool = field(default=False, init=False)
    _told: bool = field(default=False, init=False)
    _before: tuple[float, int] | None = field(default=None, init=False)
    _first: list[float] = field(default_factory=list, init=False)
    _last: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS), init=False)

    def due(self, progress: Progress, *, epoch_ended: bool) -> None:
        """After the first step compare, after each look whether steps have become slow."""
        if epoch_ended or self._told:
            return
        if not self._compared:
            self._compared = True
            self._compare(self.peak())
        self._note_pace(progress.step)

    def _compare(self, measured: int | None) -> None:
        if measured is None or not self.predicted:
            return
        difference = measured / self.predicted - 1
        if abs(difference) > TOLERANCE:
            more = "more" if difference > 0 else "less"
            so = "give --vram a smaller number" if difference > 0 else "a smaller card may be enough for this run"
            self.warn(
                f"the peak of GPU memory is {readable_bytes(measured)}, {abs(difference):.0%} {more} than predicted "
                f"({readable_bytes(self.predicted)}), which --vram and tools/estimate_memory.py go by: {so}"
            )

    def _note_pace(self, step: int) -> None:
        now = self.clock()
        if self._before is not None and step > self._before[1]:
            pace = (now - self._before[0]) / (step - self._before[1])
            self._first.append(pace) if len(self._first) < STEPS else self._last.append(pace)
        self._before = now, step
        if len(self._last) < STEPS:
            return
        times = median(self._last) / max(median(self._first), 1e-9)
        measured = self.peak()
        if times > SLOWER and measured is not None and self.size and measured > FULL * self.size:
            self._told = True
            self.warn(
                f"steps take {times:.1f} times as long as the first, and {readable_bytes(measured)} of the card's "
                f"{readable_bytes(self.size)} are in use: the driver seems to use main memory in its place (under "
                "Windows the NVIDIA setting CUDA - Sysmem Fallback Policy). Stop, and continue with less memory, such "
                "as with --gradient_checkpointing; --vram chooses"
            )


def watch_memory(prediction: Prediction | None, machine: Machine, run: Run) -> MemoryWatch:
    """The watch of a run. Drawing comes later than the first step, so its memory is not compared."""
    moments = () if prediction is None else prediction.moments
    predicted = max((moment.total for moment in moments if moment.title != "drawing"), default=None)
    return MemoryWatch(predicted, machine.memory_bytes, partial(peak_bytes, run.device), run.warn)
