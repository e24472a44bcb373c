"""Ctrl-C (SIGINT) and SIGTERM: both end a run with a message and exit code 130. Nothing is saved.

library/training/command.py catches the KeyboardInterrupt; during training its text says what has been saved before.
"""

from __future__ import annotations

import os
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


@contextmanager
def starting_processes() -> Iterator[None]:
    """Start other processes in this context. A signal that ends the program takes effect afterwards: a process that has
    got only half of its arguments prints a traceback. A terminal sends SIGINT to all processes; the new ones do not
    receive it on POSIX systems, as the one that started them ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, lambda number, _: held.append(number))
    try:
        with _inherited_without_interrupt():
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


@contextmanager
def _inherited_without_interrupt() -> Iterator[None]:
    """Block SIGINT in this thread, and so in the processes that it starts."""
    if os.name != "posix":
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # the first process that is started starts it, which unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
