"""Release pages of memory-mapped files."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Linux mman.h; see madvise(2)
MADV_DONTNEED = 4


def release(mapped: Tensor) -> bool:
    """Drop the pages of a privately mapped file, unless modified, from this process. Returns True if done (Linux only).

    They stay in the system's cache and are mapped again when read. Without this they count as memory of this process,
    and a model whose tensors were all copied would count twice.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    storage = mapped.untyped_storage()
    return bool(library.madvise(storage.data_ptr(), storage.nbytes(), MADV_DONTNEED) == 0)
