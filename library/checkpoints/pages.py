"""Pages of mapped files that are in memory and no longer needed there."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# of Linux' mman.h; see madvise(2)
MADV_DONTNEED = 4


def release(mapped: Tensor) -> bool:
    """Take the pages of a privately mapped file, which nobody has written to, out of this process. True where it was
    done (Linux).

    They stay in the system's cache and come back when they are read again; but meanwhile they count as this process's
    memory, and a model of which each tensor was copied would be there twice.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    storage = mapped.untyped_storage()
    return bool(library.madvise(storage.data_ptr(), storage.nbytes(), MADV_DONTNEED) == 0)
