"""Main memory of this process: keep freed memory, and preallocate what a run will need."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# from glibc's malloc.h; see mallopt(3)
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
M_ARENA_MAX = -8
NEVER = -1

# from Linux' mman.h; see madvise(2)
MADV_POPULATE_WRITE = 23
PIECE = 2**25  # bytes per call, about 10 ms, during which other threads cannot allocate
THREAD = "preallocate memory"


def share_one_arena() -> bool:
    """Let all threads allocate from one heap. Returns whether that is possible.

    Must be called before the first thread is started. The GNU C library gives a thread an arena of its own, which later
    threads take over when it has ended: weights loaded by one of them would lie beside the preallocated heap instead of
    in it, in pieces of 64 MB.
    """
    return _tell_allocator({M_ARENA_MAX: 1})


def keep_freed_memory() -> bool:
    """Keep freed memory for later allocations instead of returning it to the system. Returns whether that is possible.

    The GNU C library maps each large block separately and unmaps it when it is freed. A training step on the CPU frees
    and allocates all its gradients, so the kernel would clear all their pages in every step, which takes longer than
    the optimizer (benchmarks/RESULTS.md). Threads share one arena (see share_one_arena), so that they can reuse each
    other's memory. Does nothing with other C libraries. The process keeps its memory until it ends.
    """
    return _tell_allocator({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER, M_ARENA_MAX: 1})


def _tell_allocator(settings: Mapping[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(library.mallopt(name, value) for name, value in settings.items())


@contextmanager
def preallocate_heap(size: int) -> Iterator[None]:
    """Keep freed memory, and let a thread populate the next `size` bytes of the heap while the context is open.

    The system provides pages one by one when they are first touched, which takes seconds for the weights, gradients
    and optimizer state of a large model, and longer on a virtual machine whose host reclaims free memory. Here a thread
    requests them while a core is idle (mostly during imports). The block is freed before anything else is allocated, so
    later allocations use it without fragmentation. This is only an optimisation: it does nothing without enough memory,
    on a kernel before 5.14, or for 0.
    """
    if size <= 0 or not keep_freed_memory():
        yield
        return
    library = ctypes.CDLL(None)
    library.malloc.argtypes, library.malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
    library.free.argtypes = (ctypes.c_void_p,)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    start = library.malloc(size)
    library.free(start)
    stop = threading.Event()

    def populate() -> None:
        whole_pages = range(-(-start // mmap.PAGESIZE) * mmap.PAGESIZE, start + size - PIECE, PIECE)
        for address in whole_pages:
            if stop.is_set() or library.madvise(address, PIECE, MADV_POPULATE_WRITE) != 0:
                return

    thread = threading.Thread(target=populate, name=THREAD, daemon=True)
    if start:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if start:
            thread.join()
