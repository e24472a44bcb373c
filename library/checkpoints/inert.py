"""Stand-ins for the names in a torch pickle, so that its structure is found and nothing is called.

A pickle is a program: it may import any name and call it. Every name becomes an inert stand-in; those outside a short
list are refused.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from library.checkpoints.header import ITEM_SIZES, TensorInfo
from library.limits import DIMENSIONS, LONGEST_DIMENSION, PICKLE_NAME

_STORAGES = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "UntypedStorage": "U8",
}  # fmt: skip
_DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3", "complex64": "C64",
}  # fmt: skip
# Python 2 names, which pickle protocols up to 2 still write.
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "numpy._core.multiarray": "numpy.core.multiarray"}
_OLD_NAMES = {("__builtin__", "long"): "int", ("__builtin__", "unicode"): "str", ("__builtin__", "xrange"): "range"}

# Objects that trainers left in published files: callbacks, configurations, counters. None is needed, none is called;
# a trailing dot stands for a whole package.
_HARMLESS = (
    "pytorch_lightning.", "lightning.", "lightning_fabric.", "lightning_utilities.", "omegaconf.", "argparse.Namespace",
    "typing.Any", "typing.Dict", "typing.List", "collections.Counter", "datetime.",
    "pathlib.Path", "pathlib.PurePath", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath",
    "pathlib.PureWindowsPath", "builtins.object", "builtins.dict", "builtins.list", "builtins.tuple", "builtins.int",
    "builtins.complex", "builtins.float", "builtins.range", "builtins.str", "builtins.bool",
    "copyreg._reconstructor", "torch.device",
)  # fmt: skip


class Inert:
    """Stands for any harmless object of a pickle. Accepts anything and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """Accept any arguments, keep none."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accept any arguments, keep none."""

    def __setstate__(self, state: Any) -> None:
        """Accept any state, keep none."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Dropped: the object may stand for a dict."""

    def append(self, value: Any) -> None:
        """Dropped: the object may stand for a list."""

    def extend(self, values: Any) -> None:
        """Dropped: the object may stand for a list."""


class InertDict:
    """Stands for dict-like classes: returns a plain dict, as torch's unpickler requires."""

    def __new__(cls, *args: Any) -> Any:
        """A new empty dict."""
        return {}


class InertDtype:
    """Stands for numpy.dtype: remembers the code ("i8", "f4") and the byte order, so that a scalar can be read."""

    def __init__(self, code: str = "", *_: Any) -> None:
        """The code as numpy pickles it, without a byte order."""
        self.code, self.order = code if isinstance(code, str) else "", "<"

    def __setstate__(self, state: Any) -> None:
        """numpy's state: (version, byte order, ...)."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = state[1]


def inert_scalar(dtype: Any = None, data: Any = None) -> Any:
    """Stands for numpy's scalar(): the plain number, or None where the kind is unknown."""
    codes = {"i8": "q", "i4": "i", "u8": "Q", "f8": "d", "f4": "f", "b1": "?"}
    code = codes.get(getattr(dtype, "code", ""))
    raw = data.encode("latin1") if isinstance(data, str) else data
    if code is None or not isinstance(raw, bytes) or len(raw) != struct.calcsize(code):
        return None
    return struct.unpack(dtype.order + code, raw)[0]


@dataclass(frozen=True)
class Storage:
    """The bytes of tensors, by its key in the file."""

    dtype: str
    key: str
    count: int


@dataclass(frozen=True)
class InertTensor:
    """A tensor of a pickle, its storage, and the number of bytes it needs of it."""

    info: TensorInfo
    storage: str
    reach: int

    def __setstate__(self, state: Any) -> None:
        """Accept any state, keep none."""


def check_key(key: Any, depth: int = 2) -> None:
    """Raise ValueError for a key of a dict that may take long to hash, to compare or to show: more than a short tuple
    of short values."""
    if isinstance(key, tuple):
        is_long = depth == 0 or len(key) > 16
        for part in () if is_long else key:
            check_key(part, depth - 1)
    elif isinstance(key, (str, bytes)):
        is_long = len(key) > PICKLE_NAME
    elif isinstance(key, int):
        is_long = key.bit_length() > 64
    else:
        is_long = isinstance(key, (Storage, InertTensor))  # hashed by their parts
    if is_long:
        raise ValueError("a key that torch did not write")


def check_shape(shape: tuple[int, ...]) -> None:
    """Raise ValueError for a shape that no tensor can have."""
    if len(shape) > DIMENSIONS or any(not 0 <= length <= LONGEST_DIMENSION for length in shape):
        raise ValueError(f"a tensor of an impossible shape, {len(shape)} dimensions")
    if math.prod(length for length in shape if length) > LONGEST_DIMENSION:
        raise ValueError("a tensor of an impossible shape")


def _rebuild(storage: Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> InertTensor:
    dtype = next((item for item in rest if isinstance(item, str) and item in ITEM_SIZES), storage.dtype)
    size = tuple(int(n) for n in shape)
    check_shape(size)
    if not all(isinstance(number, int) for number in (offset, *stride)):  # a NaN would pass every comparison
        raise ValueError("a tensor is described wrongly")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else offset - 1
    return InertTensor(TensorInfo(dtype, size), storage.key, (last + 1) * ITEM_SIZES[dtype])


def _first(value: Any, *_: Any) -> Any:
    return value


def _ordered(*pairs: Any) -> dict[Any, Any]:
    """OrderedDict(): empty, or of a list of pairs."""
    made: dict[Any, Any] = _State()
    for key, value in pairs[0] if pairs else ():
        check_key(key)
        made[key] = value
    return made


class _State(dict[Any, Any]):
    """A dict with attributes, such as the `_metadata` of a state dict, which are dropped."""

    def __setstate__(self, state: Any) -> None:
        """Accept any state, keep none."""


def _set(*items: Any) -> set[Any]:
    for item in items[0] if items else ():
        check_key(item)
    return set(*items)


def _size(*lengths: Any) -> tuple[Any, ...]:
    return tuple(*lengths)


def _rebuild_from_type(make: Any, kind: Any, args: Any, state: Any = None) -> Any:
    if make not in (_rebuild, _first):
        raise ValueError("a tensor is described wrongly")
    return make(*args)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")  # numpy writes bytes this way under protocol 2; nothing else is needed


_STAND_INS: Mapping[str, Any] = {
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": InertDict,
    "builtins.set": _set,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.nn.parameter.Parameter": _first,
    "torch.Tensor": Inert,
    "numpy.core.multiarray.scalar": inert_scalar,
    "numpy.dtype": InertDtype,
    "_codecs.encode": _encode,
}


def modern(name: str) -> str:
    """The name in Python 3 of a global of Python 2, "module.name"."""
    module, _, last = name.rpartition(".")
    return f"{_OLD_MODULES.get(module, module)}.{_OLD_NAMES.get((module, last), last)}"


def stand_in(name: str) -> Any | None:
    """Return the stand-in for a global of a pickle, or None if the file must be refused."""
    name = modern(name)
    module, _, last = name.rpartition(".")
    if name in _STAND_INS:
        return _STAND_INS[name]
    if module in ("torch", "torch.storage") and last in _STORAGES:
        return _STORAGES[last]
    if module == "torch" and last in _DTYPES:
        return _DTYPES[last]
    if any(name == harmless or (harmless.endswith(".") and name.startswith(harmless)) for harmless in _HARMLESS):
        return InertDict if last == "AttributeDict" else Inert
    return None


def torch_stand_ins(names: frozenset[str]) -> list[tuple[Callable[..., Any], str]]:
    """Return (stand-in, "module.Name") of the names in a file, for torch.serialization.safe_globals.

    torch's own objects take precedence where weights_only knows the name; functions that rebuild tensors are not
    replaced.
    """
    # under old and new names: which one torch looks up depends on its version
    found = {name: stand_in(name) for name in sorted(names | {modern(name) for name in names})}
    return [(item, name) for name, item in found.items() if item in (Inert, InertDict, InertDtype, inert_scalar)]
