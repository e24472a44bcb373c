"""Processes that a run starts end with it, however it ends: also when it is killed and can end nothing itself."""

from __future__ import annotations

import multiprocessing
import os
import threading

from library.runtime.signals import ignore_signals


def end_with_parent() -> None:
    """Called first in a process that was started: end it as soon as its parent has ended, and by no signal of a
    terminal or a scheduler. The parent is watched through a pipe, or on Windows its handle, which close when it dies.

    The parent ends it by `kill`.
    """
    ignore_signals()
    threading.Thread(target=_wait_for_parent, name="parent", daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
