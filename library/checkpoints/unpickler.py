"""An unpickler that finds structure only, with bounded time and memory.

Names are resolved to stand-ins (inert.py). It is Python's unpickler in Python, as the one in C can be made to allocate
without limit (an index of a memo, a length before bytes) and to run forever (hashing a tuple of tuples that contain
each other twice, fifty deep).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol

from library.checkpoints.inert import Inert, Storage, check_key, modern, stand_in
from library.limits import PICKLE_STEPS, PICKLE_STRUCTURE


class TooMuchError(ValueError):
    """The file asks for more time or memory than any model needs. The text says for what."""


class _Readable(Protocol):
    def read(self, count: int, /) -> bytes: ...

    def readline(self, most: int, /) -> bytes: ...


class _Bounded:
    """A stream that gives out only so many bytes, in so many pieces."""

    def __init__(self, stream: _Readable) -> None:
        self._stream = stream
        self._bytes, self._pieces = PICKLE_STRUCTURE, PICKLE_STEPS

    def read(self, count: int) -> bytes:
        """Exactly `count` bytes. EOFError at the end."""
        self._count(count)
        found = self._stream.read(count)
        if len(found) < count:
            raise EOFError("it ends too early")
        return found

    def readinto(self, buffer: bytearray) -> int:
        """Fill a buffer."""
        buffer[:] = self.read(len(buffer))
        return len(buffer)

    def readline(self) -> bytes:
        """A line."""
        found = self._stream.readline(self._bytes)
        self._count(len(found))
        return found

    def _count(self, count: int) -> None:
        self._bytes -= count
        self._pieces -= 1
        if self._bytes < 0 or count < 0:
            raise TooMuchError(f"its structure has more than {PICKLE_STRUCTURE >> 20} MiB")
        if self._pieces < 0:
            raise TooMuchError("its structure has too many parts")


_Python: Any = pickle._Unpickler


class InertUnpickler(_Python):  # type: ignore[misc]
    """Reads the structure of one pickle. Unknown globals become inert too and are collected for the error message.

    The stream stands after the pickle's last byte afterwards, if the pickle has no frames.
    """

    dispatch: dict[int, Callable[[Any], None]] = dict(_Python.dispatch)

    def __init__(self, stream: BinaryIO | _Readable) -> None:
        super().__init__(_Bounded(stream), encoding="latin1")
        self.globals: set[str] = set()
        self.refused: list[str] = []
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a global."""
        full = f"{module}.{name}"
        self.globals.add(full)
        found = stand_in(full)
        if found is None:
            self.refused.append(modern(full))
            return Inert
        return found

    def persistent_load(self, pid: Any) -> Storage:
        """A storage: ("storage", type, key, location, number of elements, ...)."""
        _, dtype, key, _, count, *_ = pid
        if not isinstance(key, (str, int)) or not isinstance(count, int) or count < 0:
            raise ValueError("a storage is described wrongly")
        storage = Storage(dtype if isinstance(dtype, str) else "U8", str(key), count)
        self.storages[storage.key] = storage
        return storage

    def load_frame(self) -> None:
        """Frames only save calls of read()."""
        self.read(8)

    def load_setitem(self) -> None:
        """Set one item, by a key that is quickly hashed."""
        check_key(self.stack[-2])
        _Python.dispatch[pickle.SETITEM[0]](self)

    def load_setitems(self) -> None:
        """Set items, by keys that are quickly hashed."""
        for key in self.stack[::2]:
            check_key(key)
        _Python.dispatch[pickle.SETITEMS[0]](self)

    def load_dict(self) -> None:
        """A dict of the items on the stack."""
        for key in self.stack[::2]:
            check_key(key)
        _Python.dispatch[pickle.DICT[0]](self)

    def load_no_set(self) -> None:
        """torch writes no sets this way."""
        raise ValueError("a set that torch did not write")

    def load_bytes_of_8(self) -> None:
        """A length of 8 bytes would be allocated before it is read; torch does not write any."""
        raise ValueError("a length that torch did not write")

    dispatch[pickle.FRAME[0]] = load_frame
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch.update(dict.fromkeys((pickle.ADDITEMS[0], pickle.FROZENSET[0]), load_no_set))
    dispatch.update(dict.fromkeys((pickle.BYTEARRAY8[0], pickle.BINBYTES8[0], pickle.BINUNICODE8[0]), load_bytes_of_8))
