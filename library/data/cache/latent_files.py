"""Files of cached latents: their names, and how they are read and written.

There are two formats. Ours is a safetensors file next to each image: its header needs a single read, so checking
100,000 files takes seconds instead of the minutes that as many zip archives take, and its name contains the image's
full name, the bucket and a hash of the settings, so that different images, resolutions and VAEs never share a file. The
other is the `.npz` of kohya's sd-scripts, with its names and arrays.

Both contain a Fingerprint: what the latents were made from, and a checksum of every array. So a truncated or damaged
file, or one changed by a program that preserves unknown arrays (like sd-scripts), is detected.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import struct
import time
import zipfile
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from library import whole_files
from library.bounded import json_of
from library.limits import CACHED_ARRAY

Array = np.ndarray[Any, np.dtype[Any]]
Size = tuple[int, int]  # width, height
Stamp = tuple[int, int, int]  # bytes, mtime and ctime in nanoseconds

FINGERPRINT = (
    "dreamfolder_fingerprint"  # key of the fingerprint in an .npz (an array of bytes) and in a safetensors header
)
OWN_ENDING = ".safetensors"
NPZ_ENDING = ".npz"

_UNREADABLE = (
    OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError, RuntimeError,
    NotImplementedError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_DTYPES = {"F32": np.float32, "F16": np.float16}
_NPY_HEADERS: Any = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_FIRST_READ = 4096  # bytes; more than our header has
_LONGEST_HEADER = 1 << 20
_LONGEST_NAME = 240  # bytes; file systems allow 255
_SETTLED_AFTER = 2_000_000_000  # nanoseconds: the coarsest clock of a file system (FAT)


class FileHash(NamedTuple):
    """Hash of a file's content (BLAKE2b, hex), and its stamp when it was read.

    A file with the same stamp has the same content and need not be read again. This holds because the stamp includes
    the ctime, which programs cannot set back like the mtime, and because a file changed less than 2 s before it was
    read gets no stamp (None): it may change again within one tick of the file system's clock. On Windows, ctime is the
    time of creation, so an image replaced in place by one of the same length, with its mtime set back, is not noticed.
    """

    content: str
    stamp: Stamp | None

    @classmethod
    def of_file(cls, path: str) -> FileHash:
        """Hash a file. Raises OSError."""
        now = time.time_ns()
        before = stamp(path)
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
        settled = now - max(before[1:]) > _SETTLED_AFTER and before == stamp(path)
        return cls(content, before if settled else None)

    def refreshed(self, path: str) -> FileHash:
        """The current hash of the file, which is only read if its stamp has changed. Raises OSError."""
        return self if self.stamp is not None and self.stamp == stamp(path) else FileHash.of_file(path)


def stamp(path: str) -> Stamp:
    """Length, mtime and ctime of a file. Raises OSError."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


@dataclass(frozen=True)
class Fingerprint:
    """What the arrays of a file were made from. `settings` is a hash of everything besides image and mask; `sums` are
    the checksums of the arrays."""

    settings: str
    image: FileHash
    mask: FileHash | None
    sums: Mapping[str, int]

    @property
    def key(self) -> str:
        """Equal if latents and masks are equal."""
        parts = (self.settings, self.image.content, self.mask.content if self.mask else None)
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def to_json(self) -> str:
        """JSON for a file."""
        fields = {"settings": self.settings, "picture": self.image, "mask": self.mask, "sums": dict(self.sums)}
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Fingerprint:
        """Parse to_json. Raises ValueError, KeyError or TypeError for anything else."""
        fields = json_of(text)
        image, mask = fields["picture"], fields["mask"]
        return cls(fields["settings"], _file_hash(image), _file_hash(mask) if mask else None, fields["sums"])


def _file_hash(fields: list[Any]) -> FileHash:
    content, stamp = fields
    return FileHash(str(content), None if stamp is None else (int(stamp[0]), int(stamp[1]), int(stamp[2])))


@dataclass(frozen=True)
class Entry:
    """Contents of a file. `fingerprint` is None for a file of another program."""

    arrays: dict[str, Array]
    fingerprint: Fingerprint | None


def read(path: str, names: Collection[str] | None = None) -> Entry | None:
    """Read the arrays `names`, those that exist, or all. None if the file is missing, truncated or damaged, or if an
    array does not match its checksum."""
    try:
        arrays, fingerprint = _read_npz(path, names) if path.endswith(NPZ_ENDING) else _read_own(path, names)
        if fingerprint is not None and any(
            fingerprint.sums[name] != checksum(name, array) for name, array in arrays.items()
        ):
            return None
        return Entry(arrays, fingerprint)
    except _UNREADABLE:
        return None


def shapes(path: str) -> tuple[dict[str, tuple[int, ...]], Fingerprint | None] | None:
    """Read shapes and fingerprint, in our format without the arrays; None as in `read`. Verifies no checksum."""
    try:
        if path.endswith(NPZ_ENDING):
            arrays, fingerprint = _read_npz(path, None)
            return {name: array.shape for name, array in arrays.items()}, fingerprint
        with open(path, "rb") as file:
            places, fingerprint, start = _header(file)
            end = max((int(place["data_offsets"][1]) for place in places.values()), default=0)
            if os.fstat(file.fileno()).st_size != start + end:
                return None
            return {name: tuple(place["shape"]) for name, place in places.items()}, fingerprint
    except _UNREADABLE:
        return None


def _read_own(path: str, names: Collection[str] | None) -> tuple[dict[str, Array], Fingerprint | None]:
    arrays = {}
    with open(path, "rb") as file:
        places, fingerprint, start = _header(file)
        for name, place in places.items():
            if names is not None and name not in names:
                continue
            first, end = place["data_offsets"]
            if not 0 <= first <= end <= os.fstat(file.fileno()).st_size - start:
                raise EOFError(path)
            data = bytearray(end - first)  # writable, as torch requires
            file.seek(start + first)
            if file.readinto(data) != len(data):
                raise EOFError(path)
            arrays[name] = np.frombuffer(data, _DTYPES[place["dtype"]]).reshape(place["shape"])
    return arrays, fingerprint


def _header(file: Any) -> tuple[dict[str, Any], Fingerprint | None, int]:
    """Offsets of the arrays, the fingerprint, and where the arrays begin."""
    begin = file.read(_FIRST_READ)
    length = int.from_bytes(begin[:8], "little")
    if len(begin) < 8 or length > _LONGEST_HEADER:
        raise ValueError("not a safetensors file")
    text = begin[8 : 8 + length]
    if len(text) < length:
        text += file.read(length - len(text))
    places = json_of(text)
    return places, Fingerprint.from_json(places.pop("__metadata__")[FINGERPRINT]), 8 + length


def _read_npz(path: str, names: Collection[str] | None) -> tuple[dict[str, Array], Fingerprint | None]:
    with zipfile.ZipFile(path) as archive:
        stored = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        print_of = _read_npy(archive, stored[FINGERPRINT]).item() if FINGERPRINT in stored else None
        selected = [name for name in stored if name != FINGERPRINT and (names is None or name in names)]
        arrays = {name: _read_npy(archive, stored[name]) for name in selected}
        return arrays, None if print_of is None else Fingerprint.from_json(print_of)


def _read_npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    """Read an array as numpy.load(allow_pickle=False) does, which would allocate whatever size its header says.

    Raises ValueError for a size that the file does not have, and for one that no latents have.
    """
    if info.file_size > CACHED_ARRAY:
        raise ValueError(f"{info.filename} has {info.file_size} bytes")
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in _NPY_HEADERS:
            raise ValueError(f"version {version} of the npy format")
        shape, in_columns, dtype = _NPY_HEADERS[version](stream)
        data = bytearray(stream.read())  # writable, as torch requires
    if dtype.hasobject or len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{info.filename} is not of the size that its header says")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if in_columns else "C")


def checksum(name: str, array: Array) -> int:
    """CRC-32 of an array's name, shape, type and bytes."""
    about = repr((name, tuple(array.shape), array.dtype.str)).encode()
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, zlib.crc32(about))


def write(path: str, arrays: Mapping[str, Array], settings: str, image: FileHash, mask: FileHash | None) -> Fingerprint:
    """Write a file atomically (library/whole_files.py), so other processes may read or write it meanwhile. The
    extension decides the format. Raises OSError, and ValueError for values that are not finite."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: not written, because {name} contains NaN or infinite values")
    fingerprint = Fingerprint(settings, image, mask, {name: checksum(name, array) for name, array in arrays.items()})
    data = _npz_bytes(arrays, fingerprint) if path.endswith(NPZ_ENDING) else _own_bytes(arrays, fingerprint)
    with whole_files.replacing(path, durable=False) as file:
        file.write(data)
    return fingerprint


def _own_bytes(arrays: Mapping[str, Array], fingerprint: Fingerprint) -> bytes:
    from safetensors.numpy import save

    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return bytes(save(contiguous, {FINGERPRINT: fingerprint.to_json()}))


def _npz_bytes(arrays: Mapping[str, Array], fingerprint: Fingerprint) -> bytes:
    stored: dict[str, Any] = {**arrays, FINGERPRINT: np.array(fingerprint.to_json().encode())}
    file = io.BytesIO()
    np.savez(file, **stored)
    return file.getvalue()


def own_name(image: str, bucket: Size, settings: str, suffix: str) -> str:
    """Our file name for an image: cat.png_512x768_1f3870be_sd.safetensors."""
    return _shortened(image, f"_{bucket[0]}x{bucket[1]}_{settings[:8]}{suffix.removesuffix(NPZ_ENDING)}{OWN_ENDING}")


def npz_name(image: str, size: Size, suffix: str) -> str:
    """The name in sd-scripts, stem and size of the image and suffix of the family: cat_1024x1536_sd.npz."""
    return _shortened(os.path.splitext(image)[0], f"_{size[0]:04d}x{size[1]:04d}{suffix}")


def full_npz_name(image: str, size: Size, bucket: Size, settings: str, suffix: str) -> str:
    """An unambiguous .npz name where entries share npz_name: a.png next to a.jpg, or one image at several resolutions.

    It ends in the image size, which sd-scripts parses: cat.png_512x768_1f3870be_1024x1536_sd.npz.
    """
    own = f"_{bucket[0]}x{bucket[1]}_{settings[:8]}"
    return _shortened(image, f"{own}_{size[0]:04d}x{size[1]:04d}{suffix}")


def _shortened(name: str, ending: str) -> str:
    """Name and extension; a name that is too long is shortened and ends in a hash."""
    room = _LONGEST_NAME - len(os.fsencode(ending))
    whole = name.encode("utf-8", "surrogateescape")
    if len(whole) <= room:
        return name + ending
    digest = hashlib.blake2b(whole, digest_size=8).hexdigest()
    return whole[: room - 17].decode("utf-8", "ignore") + "~" + digest + ending
