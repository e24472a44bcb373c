"""Read the header of a torch pickle (.ckpt, .pt, .bin) without torch and without running any of its code.

Files with names outside a short list are refused (inert.py), and so are those that would need more memory than they
have data. Format: torch/serialization.py; the zip form is an archive with `<top>/data.pkl` and `<top>/data/<key>`, the
older form is five pickles in a row (magic number, protocol, system, object, storage keys) and the raw storages after
them.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from library.checkpoints.header import ITEM_SIZES, CheckpointError, Header, Place
from library.checkpoints.inert import Inert, InertTensor, Storage, modern, stand_in

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class _InertUnpickler(pickle.Unpickler):
    """Reads the structure. Unknown globals become inert too and are collected for the error message."""

    def __init__(self, stream: BinaryIO | io.BytesIO) -> None:
        super().__init__(stream, encoding="latin1")
        self.globals: set[str] = set()
        self.refused: list[str] = []
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        self.globals.add(full)
        found = stand_in(full)
        if found is None:
            self.refused.append(modern(full))
            return Inert
        return found

    def persistent_load(self, pid: Any) -> Storage:
        _, dtype, key, _, count, *_ = pid
        storage = Storage(dtype if isinstance(dtype, str) else "U8", str(key), int(count))
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
