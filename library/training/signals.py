"""Ctrl-C (SIGINT) and SIGTERM: both end a run with a message and exit code 130. Nothing is saved.

command.py catches the KeyboardInterrupt; during training its text says what has been saved before.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def report_interrupt(message: str) -> int:
    """Print the message of an interrupted program and return its exit code, 128 + SIGINT."""
    print(f"\n{message}", file=sys.stderr)
    return 130


@contextmanager
def explain_interrupt(explanation: Callable[[], str]) -> Iterator[None]:
    """Raise a KeyboardInterrupt again with the explanation as its text."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(explanation()) from interrupt


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, which front-ends and schedulers send to stop a run, so that partial files are
    removed and worker processes end. Does nothing outside the main thread, where Python sets no handlers, or if there
    is already a handler."""
    handled = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if handled:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if handled:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
