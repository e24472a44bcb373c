"""Write torch's zip format tensor by tensor; torch.save needs all tensors in memory.

Format: torch/serialization.py. An archive, nothing compressed: `<top>/data.pkl`, a pickle in which a storage is a
persistent id, `<top>/data/<key>`, its bytes, and `<top>/version`. Data start at multiples of 64 bytes, as in torch, so
that they can be mapped.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from library.checkpoints.lazy import LazyTensor, torch_dtype

_TOP = "archive"
_ALIGNED = 64
_LOCAL_HEADER = 30  # bytes before the name (APPNOTE.TXT 4.3.7); sizes of 64 bits take 20 more behind it
_WIDE = 20
_STORAGES = {
    "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage", "F64": "DoubleStorage",
    "I64": "LongStorage", "I32": "IntStorage", "I16": "ShortStorage", "I8": "CharStorage", "U8": "ByteStorage",
    "BOOL": "BoolStorage",
}  # fmt: skip


@dataclass(frozen=True)
class _Stored:
    """A tensor in the pickle and the key of its bytes."""

    tensor: LazyTensor
    key: str


@dataclass(frozen=True)
class _Storage:
    """The bytes of a tensor in the pickle."""

    kind: type
    key: str
    count: int


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return ("storage", obj.kind, obj.key, "cpu", obj.count) if isinstance(obj, _Storage) else None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Stored):
            return NotImplemented
        import torch

        info = obj.tensor.info
        usual = _STORAGES.get(info.dtype)  # newer dtypes have no storage class
        kind = torch.UntypedStorage if usual is None else getattr(torch, usual)
        storage = _Storage(kind, obj.key, info.nbytes if usual is None else info.count)
        placed: tuple[Any, ...] = (storage, 0, info.shape, _strides(info.shape), False, OrderedDict())
        if usual is None:
            return torch._utils._rebuild_tensor_v3, (*placed, torch_dtype(info.dtype))
        return torch._utils._rebuild_tensor_v2, placed


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def write_torch(
    stream: BinaryIO,
    tensors: Mapping[str, LazyTensor],
    contents: Iterable[memoryview],
    wrap: Callable[[dict[str, Any]], Any],
) -> None:
    """Write a file from which torch.load returns `wrap(tensors)`.

    `contents`: the bytes of the tensors, consumed one at a time in order. `wrap` may put the dict into another one with
    further plain values.
    """
    stored = {name: _Stored(tensor, str(key)) for key, (name, tensor) in enumerate(tensors.items())}
    content = io.BytesIO()
    _Pickler(content, protocol=2).dump(wrap(dict(stored)))
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, stream, "data.pkl", content.getbuffer())
        _add(archive, stream, "byteorder", memoryview(sys.byteorder.encode()))
        for each, raw in zip(stored.values(), contents, strict=True):
            _add(archive, stream, f"data/{each.key}", raw)
        _add(archive, stream, "version", memoryview(b"3\n"))


def _add(archive: zipfile.ZipFile, stream: BinaryIO, name: str, content: memoryview) -> None:
    entry = zipfile.ZipInfo(f"{_TOP}/{name}")
    entry.file_size = content.nbytes
    wide = _WIDE if content.nbytes * 1.05 > zipfile.ZIP64_LIMIT else 0  # zipfile's own rule
    start = stream.tell() + _LOCAL_HEADER + len(entry.filename) + wide
    padding = -start % _ALIGNED
    padding += _ALIGNED if padding < 4 else 0
    entry.extra = struct.pack("<2sH", b"FB", padding - 4) + b"Z" * (padding - 4)  # padding as in torch
    with archive.open(entry, "w") as target:
        target.write(content)
