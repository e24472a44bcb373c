"""Read the header of a torch pickle (.ckpt, .pt, .bin) without torch and without running any of its code.

Files with names outside a short list are refused (inert.py), and so are those that would need more memory than they
have data. Format: torch/serialization.py; the zip form is an archive with `<top>/data.pkl` and `<top>/data/<key>`, the
older form is five pickles in a row (magic number, protocol, system, object, storage keys) and the raw storages after
them.
"""

from __future__ import annotations

import lzma
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.checkpoints.header import ITEM_SIZES, CheckpointError, Header, Place
from library.checkpoints.inert import InertTensor
from library.checkpoints.unpickler import InertUnpickler
from library.limits import NESTED_STATE_DICTS, SHARED, UNPACKED
from library.messages import listed, readable_bytes, shortened

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def _structure(path: Path, unpickler: InertUnpickler, *, any_names: bool = False) -> Any:
    """Unpickle the structure. Raises CheckpointError if the file uses a name outside the list, unless `any_names`."""
    failure: Exception | None = None
    value: Any = None
    try:
        value = unpickler.load()
    except Exception as error:  # noqa: BLE001 - a pickle can fail in any way; its refused names are the better message
        failure = error
    if unpickler.refused and not any_names:
        names = listed((shortened(name) for name in sorted(unpickler.refused)), 20)
        raise CheckpointError(
            f"{path}: refused, because loading it would run code or needs objects that are not weights: {names}. "
            "No code was run. Use a .safetensors file of this model, or a file from a source that you trust."
        )
    if failure is not None:
        raise CheckpointError(
            f"{path}: its pickle cannot be read ({shortened(str(failure), 200)}). The file is damaged: get it again."
        ) from failure
    return value


def unwrap(value: Any) -> Mapping[Any, Any]:
    """Return the dict of tensors, inside some `state_dict` levels."""
    for _ in range(NESTED_STATE_DICTS):  # a dict may contain itself
        if not (isinstance(value, Mapping) and isinstance(value.get("state_dict"), Mapping)):
            break
        value = value["state_dict"]
    return value if isinstance(value, Mapping) else {}


@dataclass(frozen=True)
class PickleContent:
    """Header of a torch pickle, the globals it uses, and whether torch can memory-map it (zip form)."""

    header: Header
    globals: frozenset[str]
    mappable: bool


def _content(path: Path, value: Any, unpickler: InertUnpickler, *, mappable: bool) -> PickleContent:
    tensors = {str(name): item for name, item in unwrap(value).items() if isinstance(item, InertTensor)}
    if not tensors:
        raise CheckpointError(
            f"{path}: contains no tensors. Give a model file (.safetensors, .ckpt) or a diffusers folder."
        )
    header = Header(
        path, "ckpt",
        {name: item.info for name, item in tensors.items()},
        _numbers(value),
        places={name: Place(path, name) for name in tensors},
    )  # fmt: skip
    for name, item in tensors.items():
        storage = unpickler.storages[item.storage]
        size = storage.count * ITEM_SIZES[storage.dtype]
        if item.reach > size or item.reach < 0 or item.info.nbytes > size:
            raise CheckpointError(
                f"{path}: tensor {shortened(name)} exceeds its data. The file is damaged: get it again."
            )
    stored = sum(storage.count * ITEM_SIZES[storage.dtype] for storage in unpickler.storages.values())
    if sum(item.info.nbytes for item in tensors.values()) > SHARED * stored:
        raise CheckpointError(f"{path}: its tensors are far larger than its data. The file is damaged: get it again.")
    return PickleContent(header, frozenset(unpickler.globals), mappable)


def _numbers(value: Any) -> dict[str, str]:
    """The plain numbers beside the tensors, such as epoch and global_step, as text."""
    if not isinstance(value, Mapping):
        return {}
    return {
        str(key): str(number)
        for key, number in value.items()
        if isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) < 2**64
    }


def _truncated(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: the file is incomplete ({why}). Get it again.")


_BROKEN_ARCHIVE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, ValueError)


def _zip_structure(path: Path, *, any_names: bool = False) -> tuple[Any, InertUnpickler, bool]:
    """The structure of a torch zip file, and whether nothing in it is compressed. Checks that its storages are complete
    and no larger than the file can hold."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            records = {info.filename: info for info in entries}
            pickles = [name for name in records if name.endswith("/data.pkl") or name == "data.pkl"]
            if not pickles or any(name.endswith("/constants.pkl") for name in records):
                raise CheckpointError(
                    f"{path}: a zip archive without model weights. Give a .safetensors or .ckpt file."
                )
            if len(pickles) > 1 or len(records) < len(entries):
                raise CheckpointError(f"{path}: a zip archive with two files of one name. Get it again.")
            top = pickles[0].removesuffix("data.pkl")
            with archive.open(pickles[0]) as stream:
                unpickler = InertUnpickler(stream)
                value = _structure(path, unpickler, any_names=any_names)
    except _BROKEN_ARCHIVE as error:  # a CheckpointError is a ValueError
        raise error if isinstance(error, CheckpointError) else _truncated(path, str(error)) from error
    size = path.stat().st_size
    for storage in unpickler.storages.values():
        record = records.get(f"{top}data/{storage.key}")
        if record is None:
            raise _truncated(path, f"data/{shortened(storage.key)} is missing")
        needed = storage.count * ITEM_SIZES[storage.dtype]
        if record.file_size < needed or record.header_offset + record.compress_size > size:
            raise _truncated(path, f"data/{shortened(storage.key)} has {record.file_size} of {needed} bytes")
    unpacked = sum(record.file_size for record in entries)
    if unpacked > UNPACKED * size:
        raise CheckpointError(
            f"{path}: refused, because its {readable_bytes(size)} would unpack to {readable_bytes(unpacked)}. "
            "Use a .safetensors file of this model, or a file from a source that you trust."
        )
    return value, unpickler, all(record.compress_type == zipfile.ZIP_STORED for record in entries)


def _legacy_structure(path: Path, *, any_names: bool = False) -> tuple[Any, InertUnpickler]:
    """The structure of a file from before torch 1.6 (five pickles, then the storages). Checks its size."""
    with path.open("rb") as stream:
        unpicklers: list[InertUnpickler] = []
        values: list[Any] = []
        for _ in range(5):
            unpickler = InertUnpickler(stream)
            values.append(_structure(path, unpickler, any_names=any_names))
            unpicklers.append(unpickler)
            if len(values) == 1 and (type(values[0]) is not int or values[0] != _LEGACY_MAGIC):
                raise CheckpointError(f"{path}: a pickle that torch did not write. Give a .safetensors or .ckpt file.")
        position = stream.tell()
        end = os.fstat(stream.fileno()).st_size
    storages = unpicklers[3].storages.values()
    needed = sum(8 + storage.count * ITEM_SIZES[storage.dtype] for storage in storages)  # torch allocates all of them
    if position + needed > end:
        raise _truncated(path, f"{end} of {position + needed} bytes")
    return values[3], unpicklers[3]


def read_pickle(path: Path) -> PickleContent:
    """Read the header of a torch file of either form. Raises CheckpointError if it is damaged or unsafe."""
    if _is_zip(path):
        value, unpickler, stored = _zip_structure(path)
        return _content(path, value, unpickler, mappable=stored)
    value, unpickler = _legacy_structure(path)
    return _content(path, value, unpickler, mappable=False)


def check_pickle(path: Path) -> None:
    """Check that torch.load(weights_only=True) of a file needs no more time and memory than the file has data. Which
    names it uses is left to torch. Raises CheckpointError or OSError."""
    if _is_zip(path):
        _zip_structure(path, any_names=True)
    else:
        _legacy_structure(path, any_names=True)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"
