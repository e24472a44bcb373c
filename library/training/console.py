"""Console output of a run: log lines, the log file and the progress bar."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from library.messages import readable_time
from library.runtime.progress import ProgressBar

if TYPE_CHECKING:
    from library.options.groups.run import RunOptions

_LOGGER = logging.getLogger("dreamfolder")

MEASURED = 10  # steps after which the length of the run is estimated
RECENT = 50  # steps over which its pace is measured afterwards


class Console:
    """Writes log lines to --console_log_file or stderr, at --console_log_level, and the progress bar to stderr. Only
    the process that writes has the file (`is_writer`)."""

    def __init__(self, options: RunOptions, *, is_writer: bool = True) -> None:
        handler: logging.Handler = logging.StreamHandler()
        if options.console_log_file and is_writer:
            options.console_log_file.parent.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(options.console_log_file, mode="w", encoding="utf-8")
        text = "%(message)s" if options.console_log_simple else "%(asctime)s %(levelname)s %(message)s"
        handler.setFormatter(logging.Formatter(text, datefmt="%Y-%m-%d %H:%M:%S"))
        _LOGGER.handlers = [handler]
        _LOGGER.setLevel(options.console_log_level or "INFO")
        _LOGGER.propagate = False
        self._bar: ProgressBar | None = None
        self._step_ends: list[float] = []
        self._recent: deque[float] = deque(maxlen=RECENT + 1)

    def say(self, text: str, level: int = logging.INFO) -> None:
        """Write a log line, without breaking the progress bar."""
        if self._bar is None:
            _LOGGER.log(level, text)
        else:
            with self._bar.making_room():
                _LOGGER.log(level, text)

    @contextmanager
    def progress_bar(self, steps: int, done: int) -> Iterator[None]:
        """Show a progress bar of `steps` optimizer steps; it starts at `done`."""
        with ProgressBar("steps", steps, done) as self._bar:
            try:
                yield
            finally:
                self._bar = None

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens in here (drawing, validation, saving) is no part of the time per step."""
        if self._bar is None:
            yield
        else:
            with self._bar.pause():
                yield

    def count_step(self, average_loss: float) -> None:
        """Advance the bar by one optimizer step and show the epoch's mean loss, as avr_loss like kohya's scripts; NaN:
        not known yet. After ten steps, say once how long the run will take."""
        bar = self._bar
        if bar is None:
            return
        bar.update(1, **({} if math.isnan(average_loss) else {"avr_loss": average_loss}))
        self._recent.append(bar.elapsed)
        if len(self._step_ends) < MEASURED:
            self._step_ends.append(bar.elapsed)
            if len(self._step_ends) == MEASURED and bar.done < bar.total:
                self.say(remaining_time(self._step_ends, bar.total - bar.done, datetime.now()))

    def pace(self) -> tuple[float, float] | None:
        """Seconds per step over the last steps, without pauses, and how many seconds the remaining steps take at that
        pace; None before the second step."""
        if self._bar is None or len(self._recent) < 2:
            return None
        per_step = (self._recent[-1] - self._recent[0]) / (len(self._recent) - 1)
        return per_step, per_step * (self._bar.total - self._bar.done)


def remaining_time(step_ends: Sequence[float], steps: int, now: datetime) -> str:
    """How long `steps` more steps take, judged by the seconds at which the first ones ended. The first step is not
    counted: it compiles kernels and fills caches."""
    per_step = (step_ends[-1] - step_ends[0]) / (len(step_ends) - 1)
    end = now + timedelta(seconds=per_step * steps)
    when = f"{end:%H:%M}" if end.date() == now.date() else f"{end:%Y-%m-%d %H:%M}"
    takes = "the remaining step takes" if steps == 1 else f"the remaining {steps} steps take"
    total = readable_time(per_step * steps)
    return f"{readable_time(per_step)} per step: {takes} {total}, until {when}, without drawing, validation and saving"
