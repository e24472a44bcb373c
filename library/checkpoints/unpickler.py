"""An unpickler that finds structure only, with bounded time and memory.

Names are resolved to stand-ins (inert.py). It is Python's unpickler in Python, as the one in C can be made to allocate
without limit (an index of a memo, a length before bytes) and to run forever (hashing a tuple of tuples that contain
each other twice, fifty deep). What the file has once and passes again and again is counted each time.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol

from library.checkpoints.inert import Inert, Storage, check_key, modern, stand_in
from library.limits import LONGEST_DIMENSION, PICKLE_NAME, PICKLE_NAMES, PICKLE_STEPS, PICKLE_STRUCTURE


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

    def count_passed(self, value: Any, depth: int = 2) -> None:
        """Count what a call is passed, and what that holds, as if it were read again."""
        if isinstance(value, (str, bytes, bytearray)):
            self._count(len(value))
        elif isinstance(value, (tuple, list, dict)):
            self._count(0, len(value))
            for each in value if depth else ():
                self.count_passed(each, depth - 1)

    def _count(self, count: int, pieces: int = 1) -> None:
        self._bytes -= count
        self._pieces -= pieces
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
        self._bounded = _Bounded(stream)
        super().__init__(self._bounded, encoding="latin1")
        self.globals: set[str] = set()
        self.refused: set[str] = set()
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a global."""
        if len(module) + len(name) > PICKLE_NAME:
            raise TooMuchError(f"a name of {len(module) + len(name)} characters")
        full = f"{module}.{name}"
        self.globals.add(full)
        if len(self.globals) > PICKLE_NAMES:
            raise TooMuchError(f"it uses more than {PICKLE_NAMES} names")
        found = stand_in(full)
        if found is None:
            self.refused.add(modern(full))
            return Inert
        return found

    def persistent_load(self, pid: Any) -> Storage:
        """A storage: ("storage", type, key, location, number of elements, ...)."""
        self._bounded.count_passed(pid, 0)
        _, dtype, key, _, count, *_ = pid
        check_key(key)
        if not isinstance(key, (str, int)) or not isinstance(count, int) or not 0 <= count <= LONGEST_DIMENSION:
            raise ValueError("a storage is described wrongly")
        storage = Storage(dtype if isinstance(dtype, str) else "U8", str(key), count)
        self.storages[storage.key] = storage
        return storage

    def load_frame(self) -> None:
        """Frames only save calls of read()."""
        self.read(8)

    def load_reduce(self) -> None:
        """Call a stand-in."""
        self._bounded.count_passed(self.stack[-1])
        _Python.dispatch[pickle.REDUCE[0]](self)

    def load_newobj(self) -> None:
        """Make an object."""
        self._bounded.count_passed(self.stack[-1])
        _Python.dispatch[pickle.NEWOBJ[0]](self)

    def load_newobj_ex(self) -> None:
        """Make an object, of named values too."""
        self._bounded.count_passed(self.stack[-2:])
        _Python.dispatch[pickle.NEWOBJ_EX[0]](self)

    def _instantiate(self, klass: Any, args: Any) -> None:
        """Make an object, as protocol 0 and 1 write it."""
        self._bounded.count_passed(args)
        super()._instantiate(klass, args)

    def load_build(self) -> None:
        """Give a stand-in its state. Nothing else takes one: it could change what a name stands for."""
        state = self.stack.pop()
        made = self.stack[-1]
        if hasattr(type(made), "__setstate__"):
            made.__setstate__(state)
        elif state:
            raise ValueError("a state of something that has none")

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
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch.update(dict.fromkeys((pickle.ADDITEMS[0], pickle.FROZENSET[0]), load_no_set))
    dispatch.update(dict.fromkeys((pickle.BYTEARRAY8[0], pickle.BINBYTES8[0], pickle.BINUNICODE8[0]), load_bytes_of_8))
