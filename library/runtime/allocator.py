"""How this process keeps its main memory: what was freed is kept, and what will be needed is taken ahead."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# of glibc's malloc.h; see mallopt(3)
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
M_ARENA_MAX = -8
NEVER = -1

# of Linux' mman.h; see madvise(2)
MADV_POPULATE_WRITE = 23
PIECE = 2**25  # bytes taken in one call: 10 ms or so, in which the rest of the process can take none
THREAD = "memory taken ahead"


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


@contextmanager
def preallocate_heap(size: int) -> Iterator[None]:
    """Keep freed memory, and while the inside runs have the system hand out the first `size` bytes that it will need.

    A system hands pages out when they are first touched, one by one, which takes seconds for the weights, gradients and
    optimiser state of a large model, and many on a virtual machine whose host takes free memory back. Here a thread
    asks for them while the inside leaves a core idle (imports, above all). The block is freed before anything else is
    allocated, so the inside takes its memory from it as it would have grown, without gaps. It is a help only: where
    there is not so much memory, or the kernel is older than 5.14, nothing is taken. 0 does nothing at all.
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

    def take() -> None:
        whole_pages = range(-(-start // mmap.PAGESIZE) * mmap.PAGESIZE, start + size - PIECE, PIECE)
        for address in whole_pages:
            if stop.is_set() or library.madvise(address, PIECE, MADV_POPULATE_WRITE) != 0:
                return

    thread = threading.Thread(target=take, name=THREAD, daemon=True)
    if start:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if start:
            thread.join()
