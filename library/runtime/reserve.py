"""Memory taken from the system before it is needed."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

PIECE = 2**28  # bytes touched in one go: small enough to stop soon, large enough for all cores


@contextmanager
def memory_taken_ahead(size: int) -> Iterator[None]:
    """While the inside runs, have the system hand out `size` bytes, which later allocations then find ready.

    A system hands pages out when they are first touched, one by one, which for the optimiser state of a large model
    takes seconds, and many on a virtual machine whose host takes free memory back. That work is done in
    a thread while the inside leaves cores idle. Afterwards the memory is free within this process, so it only helps
    where keep_freed_memory() could be arranged. 0 does nothing. An exception inside ends it early. Raises RuntimeError,
    as torch does, where there is not so much memory.
    """
    import torch

    if size <= 0:
        yield
        return
    block = torch.empty(size, dtype=torch.uint8)
    stop = Event()

    def touch() -> None:
        for start in range(0, size, PIECE):
            if stop.is_set():
                return
            block[start : start + PIECE : mmap.PAGESIZE].zero_()

    with ThreadPoolExecutor(1) as pool:
        touched = pool.submit(touch)
        try:
            yield
        except BaseException:
            stop.set()
            raise
        touched.result()
