"""Read model files: the header without torch, then tensors one by one, memory-mapped or read.

    header = read_header(path)          # names, shapes, dtypes; a .ckpt is checked, and no code in it is run
    reader = TensorReader(header)       # or open_tensors(path)
    reader.get("model.diffusion_model.out.2.weight")

Formats: safetensors (8 bytes little-endian header length, JSON, data), torch's .ckpt/.pt/.bin, diffusers folders.
Formats are detected from the first bytes, not from names. Writing: writer.py.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.bounded import json_of
from library.checkpoints.folders import read_folder, read_part
from library.checkpoints.header import (
    ITEM_SIZES,
    CheckpointError,
    Header,
    Place,
    TensorInfo,
    outer_level,
    without_outer_level,
)
from library.checkpoints.inert import check_shape, torch_stand_ins
from library.checkpoints.pickles import read_pickle, unwrap
from library.checkpoints.quantized import with_scales_applied
from library.limits import SAFETENSORS_HEADER
from library.messages import shortened

if TYPE_CHECKING:
    from torch import Tensor

    from library.checkpoints.lazy import LazyTensor

__all__ = [
    "CheckpointError", "Header", "Place", "TensorInfo", "TensorReader", "legacy_hash", "open_tensors", "outer_level",
    "payload_sha256", "read_header", "sha256",
]  # fmt: skip


def read_header(path: Path | str, variant: str = "") -> Header:
    """Read names, shapes and dtypes of a model file or diffusers folder, in milliseconds and without torch.

    `variant`: variant of a folder's files to prefer ("fp16"); "": those without a variant.
    Raises CheckpointError: no such file, not a model, truncated or damaged, a pickle that would run code.
    """
    path = Path(path)
    if path.is_dir():
        return with_scales_applied(read_folder(path, _read_file, variant))
    return with_scales_applied(without_outer_level(_read_file(path)))


def read_part_header(path: Path | str) -> Header:
    """Read the header of one part of a model, which may be a folder with only config.json and weights (a VAE)."""
    path = Path(path)
    header = read_part(path, _read_file) if path.is_dir() else without_outer_level(_read_file(path))
    return with_scales_applied(header)


def _read_file(path: Path) -> Header:
    try:
        with path.open("rb") as stream:
            start = stream.read(16)
            size = os.fstat(stream.fileno()).st_size
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file or folder. Check the path.") from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}). Check the path and its permissions."
        ) from error
    if not size:
        raise CheckpointError(f"{path}: the file is empty. Get it again.")
    if start[8:9] == b"{":  # tested first: a header length may look like the start of a pickle
        return _read_safetensors(path, size)
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return read_pickle(path).header
    why = "a git-lfs pointer, not the model. Run `git lfs pull`" if start.startswith(b"version https://") else (
        "neither a .safetensors nor a torch file. Give a model file; if it should be one, get it again"
    )  # fmt: skip
    raise CheckpointError(f"{path}: {why}.")


def _read_safetensors(path: Path, size: int) -> Header:
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size - 8, SAFETENSORS_HEADER):
            raise _cut(path, size, 8 + length)
        raw = stream.read(length)
    try:
        table = json_of(raw)
        metadata = {str(k): str(v) for k, v in table.pop("__metadata__", {}).items()}
        spans = {name: _span(entry) for name, entry in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: its header is damaged ({shortened(str(error), 200)}). Get the file again."
        ) from error
    base = 8 + length
    for name, (info, start, end) in spans.items():
        if info.nbytes != end - start or start < 0:
            raise CheckpointError(
                f"{path}: tensor {shortened(name)} has {end - start} of {info.nbytes} bytes. Get the file again."
            )
    needed = base + max((end for _, _, end in spans.values()), default=0)
    if needed > size:
        raise _cut(path, size, needed)
    if sum(info.nbytes for info, _, _ in spans.values()) > size - base:
        raise CheckpointError(f"{path}: its tensors overlap. The file is damaged: get it again.")
    if not spans:
        raise CheckpointError(
            f"{path}: contains no tensors. Give a model file (.safetensors, .ckpt) or a diffusers folder."
        )
    return Header(
        path, "safetensors",
        {name: info for name, (info, _, _) in spans.items()},
        metadata,
        places={name: Place(path, name, base + start) for name, (_, start, _) in spans.items()},
    )  # fmt: skip


def _span(entry: Mapping[str, Any]) -> tuple[TensorInfo, int, int]:
    start, end = entry["data_offsets"]
    dtype = entry["dtype"]
    if dtype not in ITEM_SIZES:
        raise ValueError(f"unknown dtype {shortened(str(dtype))}")
    shape = tuple(entry["shape"])
    if not all(type(n) is int for n in (*shape, start, end)):
        raise ValueError("a length that is no whole number")
    check_shape(shape)
    return TensorInfo(dtype, shape), start, end


def _cut(path: Path, size: int, needed: int) -> CheckpointError:
    return CheckpointError(f"{path}: the file is incomplete ({size} of {needed} bytes). Get it again.")


class TensorReader:
    """Reads tensors of a checkpoint by name. Files are memory-mapped, so that unused tensors need no memory.

    `mapped=False` reads each tensor into memory instead, which is faster on some network drives and on Windows drives
    under WSL; a .ckpt is then read whole. A mapped file must stay in place while its tensors are in use. `close()`
    releases it (existing tensors stay valid); Windows requires that before the file can be replaced.
    """

    def __init__(self, header: Header, *, mapped: bool = True) -> None:
        self.header = header
        self._mapped = mapped
        self._bytes: dict[Path, Tensor] = {}
        self._pickled: dict[Path, Mapping[str, Tensor]] = {}
        self._lock = threading.Lock()  # several threads load tensors; each file is opened once

    def names(self) -> Iterator[str]:
        """Return the names of all tensors."""
        return iter(self.header.tensors)

    def lazy(self, name: str) -> LazyTensor:
        """Return a tensor that is read when needed. It has a place only in .safetensors files."""
        from library.checkpoints.lazy import LazyTensor

        place = self.header.places.get(name)
        has_place = place is not None and place.start is not None and name not in self.header.scaled
        return LazyTensor(self.header.tensors[name], partial(self.get, name), place=place if has_place else None)

    def get(self, name: str) -> Tensor:
        """Return a tensor with the shape and dtype of the header. Writing to it does not change the file."""
        scaled = self.header.scaled.get(name)
        if scaled is None:
            return self._stored(self.header.places[name], self.header.tensors[name])
        weight = self._stored(scaled.place, scaled.info).float()
        scale = self._stored(scaled.scale_place, scaled.scale_info).float()
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))

    def _stored(self, place: Place, info: TensorInfo) -> Tensor:
        """Return a tensor as it is stored."""
        if not self._mapped and place.start is not None:
            return _read(place.file, place.start, info)
        with self._lock:
            if place.start is None:
                return self._from_pickle(place)
            return self._from_bytes(place.file, place.start, info)

    def release(self) -> None:
        """Free the memory of what was read so far; it can be read again."""
        from library.checkpoints import pages

        with self._lock:
            for mapped in self._bytes.values():
                pages.release(mapped)

    def close(self) -> None:
        """Release the mapped files."""
        self._bytes.clear()
        self._pickled.clear()

    def _from_bytes(self, file: Path, start: int, info: TensorInfo) -> Tensor:
        import torch

        from library.checkpoints.lazy import torch_dtype

        if file not in self._bytes:
            size = file.stat().st_size
            storage = torch.UntypedStorage.from_file(str(file), False, size)  # noqa: FBT003 - positional only; a private mapping, copied on write
            self._bytes[file] = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
        dtype = torch_dtype(info.dtype)
        if not info.count:
            return torch.empty(info.shape, dtype=dtype)
        raw = self._bytes[file][start : start + info.nbytes]
        if start % ITEM_SIZES[info.dtype]:  # files of old writers are not aligned
            raw = raw.clone()
        return raw.view(dtype).view(info.shape)

    def _from_pickle(self, place: Place) -> Tensor:
        if place.file not in self._pickled:
            self._pickled[place.file] = _load_pickle(place.file, mapped=self._mapped)
        return self._pickled[place.file][place.name]


def _read(file: Path, start: int, info: TensorInfo) -> Tensor:
    """Read one tensor of a safetensors file. Raises CheckpointError if the file has become shorter."""
    import torch

    from library.checkpoints.lazy import torch_dtype

    tensor = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
    if not info.count:
        return tensor
    buffer = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        done = 0
        while done < info.nbytes:  # one call reads at most about 2 GB
            count = stream.readinto(buffer[done:])
            if not count:
                raise _cut(file, start + done, start + info.nbytes)
            done += count
    return tensor


def _load_pickle(path: Path, *, mapped: bool) -> Mapping[str, Tensor]:
    """Call torch.load(weights_only=True), with inert stand-ins for the harmless globals in the file."""
    import pickle

    import torch

    content = read_pickle(path)
    try:
        with torch.serialization.safe_globals(torch_stand_ins(content.globals)):  # type: ignore[arg-type]
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and content.mappable)
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, TypeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = next((line.strip() for line in lines if "error:" in line), lines[0])
        raise CheckpointError(
            f"{path}: torch cannot read it ({reason}). Use a .safetensors file of this model."
        ) from error
    return {str(name): item.detach() for name, item in unwrap(value).items() if isinstance(item, torch.Tensor)}


def open_tensors(path: Path | str) -> TensorReader:
    """Open a model file or diffusers folder. Raises CheckpointError as read_header does."""
    return TensorReader(read_header(path))


def sha256(path: Path | str) -> str:
    """Return the SHA-256 of a whole file, 64 hex digits (ss_new_sd_model_hash)."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def payload_sha256(path: Path | str) -> str:
    """Return the SHA-256 of a safetensors file without its header, 64 hex digits (sshs_model_hash)."""
    with Path(path).open("rb") as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        return hashlib.file_digest(stream, "sha256").hexdigest()


def legacy_hash(path: Path | str) -> str:
    """Return the first 8 hex digits of the SHA-256 of 64 KiB at 1 MiB (ss_sd_model_hash, WebUIs' old hash)."""
    with Path(path).open("rb") as stream:
        stream.seek(0x100000)
        return hashlib.sha256(stream.read(0x10000)).hexdigest()[:8]
