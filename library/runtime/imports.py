"""Importing large packages quickly and quietly."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from library.runtime.garbage import gc_paused


@contextmanager
def large_imports(without: Sequence[str] = ()) -> Iterator[None]:
    """Import inside this what brings thousands of modules with it.

    Their functions and classes stay for good, so the garbage collector is off meanwhile, which would walk over all of
    them again and again (a fifth of the time), and never looks at them later. `without`: packages that are not to come
    along although they are installed. Inside, they count as not installed, and whoever looks once at its own import
    holds to that; the program itself can import them afterwards.
    """
    hidden = [name for name in without if name not in sys.modules]
    known = len(sys.modules)
    with gc_paused():
        try:
            for name in hidden:
                sys.modules[name] = None  # type: ignore[assignment]  # Python's own mark for what must not be imported
            yield
        finally:
            for name in hidden:
                del sys.modules[name]
            if len(sys.modules) > known:
                gc.freeze()


def import_in_thread(imports: Callable[[], object]) -> None:
    """Call what imports packages in a thread of its own, and wait for it.

    Packages keep errors of imports that they only try, and an error keeps the functions that it went through, these
    their callers, and all of them what they held in the end: a whole model, if one was loaded meanwhile. A thread has
    no callers.
    """
    with ThreadPoolExecutor(1) as thread:
        thread.submit(imports).result()


@contextmanager
def frequent_thread_switches() -> Iterator[None]:
    """Inside this a thread that imports lets the others go on every half millisecond in place of every five.

    Who reads and writes files in pieces asks for the interpreter with each of them, and would wait ten times as long.
    """
    usual = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def quiet_libraries() -> None:
    """Libraries' remarks that no user can act on; what they raise still shows. Must run before they are imported."""
    for variable, level in (
        ("DIFFUSERS_VERBOSITY", "error"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TF_CPP_MIN_LOG_LEVEL", "2"),
    ):
        os.environ.setdefault(variable, level)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
