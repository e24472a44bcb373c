"""Importing large packages quickly."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


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
    collects = gc.isenabled()
    gc.disable()
    try:
        for name in hidden:
            sys.modules[name] = None  # type: ignore[assignment]  # Python's own mark for what must not be imported
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        if len(sys.modules) > known:
            gc.freeze()
        if collects:
            gc.enable()
