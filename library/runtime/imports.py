"""Import large packages quickly and quietly."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from library.runtime.garbage import gc_paused

ONLY_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""For transformers' from_pretrained: no network, and no Python file from a model's folder is run. If nothing is said,
transformers asks at the terminal whether it may run them."""
NOT_NEEDED = ("bitsandbytes", "optimum", "peft", "torchao")
"""Packages that diffusers and transformers import if they are installed, for features that are not used here. It takes
seconds."""


@contextmanager
def large_imports(without: Sequence[str] = ()) -> Iterator[None]:
    """A context for imports of packages with thousands of modules.

    Their functions and classes are never freed, so the garbage collector is paused (it would take a fifth of the time)
    and ignores them afterwards. `without`: installed packages that other packages must not import. Inside the context
    they appear not to be installed, and packages that check once, on import, keep that result; the program can import
    them afterwards.
    """
    hidden = [name for name in without if name not in sys.modules]
    known = len(sys.modules)
    with gc_paused():
        try:
            for name in hidden:
                sys.modules[name] = None  # type: ignore[assignment]  # makes Python raise ModuleNotFoundError
            yield
        finally:
            for name in hidden:
                del sys.modules[name]
            if len(sys.modules) > known:
                gc.freeze()


def import_in_thread(imports: Callable[[], object]) -> None:
    """Call `imports` in a new thread, and wait for it.

    Packages may keep the exception of a failed optional import, whose traceback keeps alive the frames of all callers
    with their local variables, such as a whole model. A new thread has no callers.
    """
    with ThreadPoolExecutor(1) as thread:
        thread.submit(imports).result()


@contextmanager
def frequent_thread_switches() -> Iterator[None]:
    """Switch threads every half millisecond instead of every five, for work parallel to imports.

    A thread that reads and writes files in pieces needs the GIL for each, and would wait ten times as long.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def quiet_libraries() -> None:
    """Silence warnings of libraries that users cannot act on, and their telemetry. Must be called before they are
    imported."""
    for variable, level in (
        ("DIFFUSERS_VERBOSITY", "error"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TF_CPP_MIN_LOG_LEVEL", "2"),
        # nothing is sent: what is asked for by a flag needs none of them
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("DISABLE_TELEMETRY", "1"),
        ("WANDB_DISABLE_CODE", "true"),
    ):
        os.environ.setdefault(variable, level)
    for package in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # the last one speaks of torchao
        logging.getLogger(package).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
