"""Progress bars: on a terminal one line that is drawn again and again, in a file or pipe whole lines, at most one every
ten seconds and the last one.

The text is tqdm's, which front-ends read: `steps:  10%|█         | 2/20 [00:05<00:45,  2.51s/it, avr_loss=0.13]`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self, TextIO, TypeVar

from library.runtime.terminal import columns_of

Item = TypeVar("Item")

ON_TERMINALS = 0.1
IN_FILES = 10.0
"""Seconds between two states that are shown."""


@dataclass
class ProgressBar:
    """A progress bar for `total` things, `done` of which were finished before it began.

    `unit`: what is counted; "B" are bytes, shown as 1.5M. `delay`: seconds before it appears. `leave`: the last state
    stays. `stream` None: stderr. Not shown if there is nothing to do, or if not `shown`.
    """

    description: str
    total: int
    done: int = 0
    unit: str = "it"
    shown: bool = True
    delay: float = 0.0
    leave: bool = True
    stream: TextIO | None = None
    now: Callable[[], float] = time.monotonic
    _values: dict[str, float] = field(default_factory=dict, init=False)
    _paused: float = field(default=0.0, init=False)  # seconds, without the pause that is going on
    _pause_began: float | None = field(default=None, init=False)
    _last: tuple[float, int] | None = field(default=None, init=False)  # when and at which count it was shown

    def __post_init__(self) -> None:
        self._stream = self.stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._shown = self.shown and self.total > 0
        self._before, self._began = self.done, self.now()

    def __enter__(self) -> Self:
        if self._is_terminal and not self.delay:
            self._show()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last state, or remove the bar."""
        if not self._is_terminal:
            if self.leave and self.elapsed >= self.delay and (self._last is None or self._last[1] != self.done):
                self._show()
        elif self.leave and (self._last is not None or self.elapsed >= self.delay):
            self._show()
            self._write("\n")
        elif self._last is not None:
            self._clear()
        self._shown = False

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning, without pauses."""
        end = self.now() if self._pause_began is None else self._pause_began
        return end - self._began - self._paused

    def update(self, count: int = 1, **values: float) -> None:
        """Count finished things; show it if the last time is long enough ago. `values` are shown from now on."""
        self.done += count
        self._values |= values
        last = self._began if self._last is None else self._last[0]
        every = ON_TERMINALS if self._is_terminal else IN_FILES
        if self.now() - last >= every and self.elapsed >= self.delay:
            self._show()

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, and count each when the next one is asked for."""
        with self:
            for item in items:
                yield item
                self.update()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent in here counts neither in the rate nor in the remaining time."""
        if self._pause_began is not None:
            yield
            return
        self._pause_began = self.now()
        try:
            yield
        finally:
            self._paused += self.now() - self._pause_began
            self._pause_began = None

    @contextmanager
    def making_room(self) -> Iterator[None]:
        """Remove the bar from the terminal while something else is written to it."""
        visible = self._is_terminal and self._last is not None
        if visible:
            self._clear()
        yield
        if visible:
            self._show()

    def _show(self) -> None:
        if not self._shown:
            return
        self._last = self.now(), self.done
        text = self._text()
        self._write(f"\r{text}" if self._is_terminal else f"{text}\n")

    def _text(self) -> str:
        from tqdm import tqdm  # slow to import, and not needed where nothing is shown

        text: str = tqdm.format_meter(
            self.done,
            self.total,
            self.elapsed,
            prefix=self.description,
            ncols=self._columns() if self._is_terminal else None,
            ascii=not _can_draw_blocks(self._stream),
            unit=self.unit,
            unit_scale=self.unit == "B",
            postfix=", ".join(f"{name}={tqdm.format_num(value)}" for name, value in self._values.items()),
            initial=self._before,
        )
        return text

    def _clear(self) -> None:
        self._write(f"\r{' ' * self._columns()}\r")

    def _columns(self) -> int:
        """Columns of the terminal but the last: writing there moves the cursor to the next line on Windows."""
        return (columns_of(self._stream) or 80) - 1

    def _write(self, text: str) -> None:
        if self._shown:
            self._stream.write(text)
            self._stream.flush()


def _can_draw_blocks(stream: TextIO) -> bool:
    try:
        "█▏".encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
