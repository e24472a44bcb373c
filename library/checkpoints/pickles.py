"""Read the header of a torch pickle (.ckpt, .pt, .bin) without torch and without running any of its code.

A pickle is a program: it may import any name and call it. This unpickler resolves every name to an inert stand-in, so
that it finds the structure (names, dtypes, shapes) and calls nothing. Files with names outside a short list are
refused. Format: torch/serialization.py; the zip form is an archive with `<top>/data.pkl` and `<top>/data/<key>`, the
older form is five pickles in a row (magic number, protocol, system, object, storage keys) and the raw storages after
them.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from library.checkpoints.header import ITEM_SIZES, CheckpointError, Header, Place, TensorInfo

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
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
        self.code, self.order = str(code), "<"

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
class _Storage:
    dtype: str
    key: str
    count: int


@dataclass(frozen=True)
class InertTensor:
    """A tensor of a pickle, its storage, and the number of bytes it needs of it."""

    info: TensorInfo
    storage: str
    reach: int


def _rebuild(storage: _Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> InertTensor:
    dtype = next((item for item in rest if isinstance(item, str) and item in ITEM_SIZES), storage.dtype)
    size = tuple(int(n) for n in shape)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else offset - 1
    return InertTensor(TensorInfo(dtype, size), storage.key, (last + 1) * ITEM_SIZES[dtype])


def _first(value: Any, *_: Any) -> Any:
    return value


def _rebuild_from_type(make: Any, kind: Any, args: Any, state: Any = None) -> Any:
    return make(*args)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")  # numpy writes bytes this way under protocol 2; nothing else is needed


_STAND_INS: Mapping[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": InertDict,
    "builtins.set": set,
    "torch.Size": tuple,
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


def _modern(name: str) -> str:
    module, _, last = name.rpartition(".")
    return f"{_OLD_MODULES.get(module, module)}.{_OLD_NAMES.get((module, last), last)}"


def stand_in(name: str) -> Any | None:
    """Return the stand-in for a global of a pickle, or None if the file must be refused."""
    name = _modern(name)
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
    found = {name: stand_in(name) for name in sorted(names | {_modern(name) for name in names})}
    return [(item, name) for name, item in found.items() if item in (Inert, InertDict, InertDtype, inert_scalar)]


class _InertUnpickler(pickle.Unpickler):
    """Reads the structure. Unknown globals become inert too and are collected for the error message."""

    def __init__(self, stream: BinaryIO | io.BytesIO) -> None:
        super().__init__(stream, encoding="latin1")
        self.globals: set[str] = set()
        self.refused: list[str] = []
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        self.globals.add(full)
        found = stand_in(full)
        if found is None:
            self.refused.append(_modern(full))
            return Inert
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, count, *_ = pid
        storage = _Storage(dtype if isinstance(dtype, str) else "U8", str(key), int(count))
        self.storages[storage.key] = storage
        return storage


def _structure(path: Path, unpickler: _InertUnpickler) -> Any:
    """Unpickle the structure. Raises CheckpointError if the file uses a name outside the list."""
    failure: Exception | None = None
    value: Any = None
    try:
        value = unpickler.load()
    except Exception as error:  # noqa: BLE001 - a pickle can fail in any way; its refused names are the better message
        failure = error
    if unpickler.refused:
        names = ", ".join(sorted(set(unpickler.refused)))
        raise CheckpointError(
            f"{path}: refused, because loading it would run code or needs objects that are not weights: {names}. "
            "No code was run. Use a .safetensors file of this model, or a file from a source that you trust."
        )
    if failure is not None:
        raise CheckpointError(
            f"{path}: its pickle cannot be read ({failure}). The file is damaged: get it again."
        ) from failure
    return value


def unwrap(value: Any) -> Mapping[Any, Any]:
    """Return the dict of tensors, inside any number of `state_dict` levels."""
    while isinstance(value, Mapping) and isinstance(value.get("state_dict"), Mapping):
        value = value["state_dict"]
    return value if isinstance(value, Mapping) else {}


@dataclass(frozen=True)
class PickleContent:
    """Header of a torch pickle, the globals it uses, and whether torch can memory-map it (zip form)."""

    header: Header
    globals: frozenset[str]
    mappable: bool


def _content(path: Path, value: Any, unpickler: _InertUnpickler, *, mappable: bool) -> PickleContent:
    tensors = {str(name): item for name, item in unwrap(value).items() if isinstance(item, InertTensor)}
    if not tensors:
        raise CheckpointError(
            f"{path}: contains no tensors. Give a model file (.safetensors, .ckpt) or a diffusers folder."
        )
    numbers = {}
    if isinstance(value, Mapping):
        numbers = {str(k): str(v) for k, v in value.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    header = Header(
        path, "ckpt",
        {name: item.info for name, item in tensors.items()},
        numbers,
        places={name: Place(path, name) for name in tensors},
    )  # fmt: skip
    for name, item in tensors.items():
        storage = unpickler.storages[item.storage]
        if item.reach > storage.count * ITEM_SIZES[storage.dtype] or item.reach < 0:
            raise CheckpointError(f"{path}: tensor {name} exceeds its data. The file is damaged: get it again.")
    return PickleContent(header, frozenset(unpickler.globals), mappable)


def _truncated(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: the file is incomplete ({why}). Get it again.")


def read_zip(path: Path) -> PickleContent:
    """Read the header of a torch zip file and check that every storage is complete."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in records if name.endswith("/data.pkl") or name == "data.pkl"]
            if not pickles or any(name.endswith("/constants.pkl") for name in records):
                raise CheckpointError(
                    f"{path}: a zip archive without model weights. Give a .safetensors or .ckpt file."
                )
            top = pickles[0].removesuffix("data.pkl")
            unpickler = _InertUnpickler(io.BytesIO(archive.read(pickles[0])))
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise _truncated(path, str(error)) from error
    value = _structure(path, unpickler)
    size = path.stat().st_size
    for storage in unpickler.storages.values():
        record = records.get(f"{top}data/{storage.key}")
        if record is None:
            raise _truncated(path, f"data/{storage.key} is missing")
        needed = storage.count * ITEM_SIZES[storage.dtype]
        if record.file_size < needed or record.header_offset + record.compress_size > size:
            raise _truncated(path, f"data/{storage.key} has {record.file_size} of {needed} bytes")
    stored = all(record.compress_type == zipfile.ZIP_STORED for record in records.values())
    return _content(path, value, unpickler, mappable=stored)


def read_legacy(path: Path) -> PickleContent:
    """Read the header of a file from before torch 1.6 (five pickles, then the storages) and check its size."""
    with path.open("rb") as stream:
        unpicklers = []
        values = []
        for _ in range(5):
            unpickler = _InertUnpickler(stream)
            values.append(_structure(path, unpickler))
            unpicklers.append(unpickler)
            if len(values) == 1 and values[0] != _LEGACY_MAGIC:
                raise CheckpointError(f"{path}: a pickle that torch did not write. Give a .safetensors or .ckpt file.")
        position = stream.tell()
        content = _content(path, values[3], unpicklers[3], mappable=False)
        end = os.fstat(stream.fileno()).st_size
    storages = unpicklers[3].storages
    needed = sum(
        8 + storages[key].count * ITEM_SIZES[storages[key].dtype] for key in map(str, values[4]) if key in storages
    )
    if position + needed > end:
        raise _truncated(path, f"{end} of {position + needed} bytes")
    return content


def read_pickle(path: Path) -> PickleContent:
    """Read the header of a torch file of either form. Raises CheckpointError if it is damaged or unsafe."""
    with path.open("rb") as stream:
        start = stream.read(4)
    return read_zip(path) if start == b"PK\x03\x04" else read_legacy(path)
