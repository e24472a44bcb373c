"""How this process takes memory from the system and gives it back."""

from __future__ import annotations

import ctypes
import sys

# malloc.h of the GNU C library
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
M_ARENA_MAX = -8
NEVER = -1


def keep_freed_memory() -> bool:
    """Keep freed memory for the next allocation instead of giving it back to the system. True where that could be done.

    The GNU C library maps each large block by itself and unmaps it when it is freed. A training step on the CPU frees
    all its gradients and takes them again, so the kernel would clear all their pages in every step, which costs more
    time than the optimiser (benchmarks/RESULTS.md). All threads share one arena, or what one of them freed would not
    serve the others. Other C libraries are left as they are. What was taken once stays with the process until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER, M_ARENA_MAX: 1}
    return all(library.mallopt(name, value) for name, value in settings.items())
