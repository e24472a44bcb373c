"""Signals that end a program: Ctrl-C (SIGINT), SIGTERM, SIGHUP, and on Windows CTRL_BREAK (SIGBREAK).

A signal raises an Interrupt, so that partial files are removed and other processes end; the exit code is 128 and the
number of the signal. While a run trains, the first signal is a request to stop after the step (StopRequest), and only a
second one is an Interrupt.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | int | None

ENDING: Sequence[int] = tuple(
    int(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)
)
"""The signals that end a program. Windows raises SIGBREAK for a closed window and a system that shuts down, too."""

AGAIN_AFTER = 1.0  # seconds: what comes earlier is the same wish, passed on by a launcher or sent to the group as well


class Interrupt(KeyboardInterrupt):
    """A program is to end now, because of the signal `number`. The text is for the user."""

    def __init__(self, number: int = signal.SIGINT, explanation: str = "") -> None:
        super().__init__(explanation)
        self.number = number


class StoppedAside(BaseException):
    """Raised where something that is computed beside the training (an image, a validation) is given up, as the run is
    to stop. Not an Exception: errors there do not end a run."""


def report_interrupt(message: str, interrupt: KeyboardInterrupt | None = None) -> int:
    """Print the message of an interrupted program and return its exit code: 128 and the number of the signal, 130 for
    Ctrl-C."""
    with suppress(OSError):  # the terminal may be gone
        print(f"\n{message}", file=sys.stderr, flush=True)
    return 128 + getattr(interrupt, "number", signal.SIGINT)


@contextmanager
def explain_interrupt(explanation: Callable[[], str]) -> Iterator[None]:
    """Raise a KeyboardInterrupt without a text again, with the explanation as its text."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if str(interrupt):
            raise
        raise Interrupt(getattr(interrupt, "number", signal.SIGINT), explanation()) from interrupt


@contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Raise Interrupt for every signal that ends a program; see `_handled_by`. One that comes soon after another is
    passed over: it would cut off the cleaning up."""
    last = -AGAIN_AFTER

    def interrupt(number: int, _: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        release_lost_terminal()
        if last - before >= AGAIN_AFTER:
            raise Interrupt(number)

    with _handled_by(interrupt):
        yield


@dataclass
class StopRequest:
    """Whether a run is to stop after its step: `number` is the signal that asks for it."""

    number: int | None = None
    _at: float = field(default=0.0, init=False)

    def __bool__(self) -> bool:
        """Whether the run is to stop."""
        return self.number is not None

    @contextmanager
    def heard(self) -> Iterator[None]:
        """In this context the first signal is a request, and a second one raises Interrupt; see `_handled_by`."""
        with _handled_by(self._hear):
            yield

    def _hear(self, number: int, _: FrameType | None) -> None:
        release_lost_terminal()
        now = time.monotonic()
        if self.number is None:
            self.number, self._at = number, now
            _write_to_stderr("\nstopping: the step is finished and saved first; once more to stop at once\n")
        elif now - self._at >= AGAIN_AFTER:
            raise Interrupt(number)


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle ENDING by `handler`, and afterwards as before. A signal that is ignored (nohup, a background job of a
    shell) stays ignored, and so does everything outside the main thread, where Python sets no handlers."""
    before: dict[int, Handler] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in ENDING}
        before = {number: known for number, known in before.items() if known not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)


def release_lost_terminal() -> None:
    """Where a terminal was closed, let what is printed to it go nowhere: writing there would be an error."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


def _write_to_stderr(text: str) -> None:
    """Print from a signal handler, which may have cut off another print."""
    with suppress(OSError, ValueError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, text.encode())


@contextmanager
def starting_processes() -> Iterator[None]:
    """Start other processes in this context. They do not receive the signals that end a program, which a terminal or a
    scheduler sends to all processes: the one that started them ends them, by `kill`. A signal that comes meanwhile
    takes effect afterwards: a process that has got only half of its arguments prints a traceback."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    handlers = {number: signal.getsignal(number) for number in ENDING}
    for number in handlers:
        signal.signal(number, lambda number, _: held.append(number))
    try:
        with _inherited_without_signals():
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


@contextmanager
def _inherited_without_signals() -> Iterator[None]:
    """Let the processes that are started in this context not receive signals that end a program: blocked on POSIX
    systems; on Windows Ctrl-C is ignored, and `ignore_signals` does the rest."""
    if os.name != "posix":
        with _without_ctrl_c():
            yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # the first process that is started starts it, which unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Ignore Ctrl-C in this process, as the processes that it starts inherit that."""
    import ctypes

    set_handler = ctypes.windll.kernel32.SetConsoleCtrlHandler  # type: ignore[attr-defined]
    set_handler(None, 1)
    try:
        yield
    finally:
        set_handler(None, 0)


def ignore_signals() -> None:
    """Ignore the signals that end a program, in a process that another one ends."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
