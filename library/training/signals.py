"""What Ctrl-C and a request to terminate do to a run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM, which front-ends and schedulers stop a run with, do what Ctrl-C does: half-written files go, and the
    processes that prepare images. Only the main thread may do that, and nobody's own handler is replaced."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
