"""Errors for a lack of memory: how they are told from others, and how to get some of it back."""

from __future__ import annotations

import gc
import sys
import traceback

SIGNS = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")  # in messages of torch's RuntimeErrors


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is about a lack of memory."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def free_memory(error: BaseException) -> None:
    """Free what was computed where an error arose: its frames hold activations until it is forgotten."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if "torch" in sys.modules:
        from library.runtime.accelerator import release_cached

        release_cached()
