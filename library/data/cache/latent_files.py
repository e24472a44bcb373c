"""The files of cached latents: how they are named, what stands in one, and how one is read and written.

Two formats hold the same. Ours is a safetensors file beside each image: its header is read in one go, so that 100,000
of them are looked at in seconds where opening as many zip archives takes minutes, and its name holds the image's
whole name, the bucket and a digest of the settings, so that no two images, resolutions or VAEs ever want the same
file. The other is the `.npz` of kohya's sd-scripts, under its names and with its arrays.

Either carries a Note: what the latents are of, and a checksum of every array. So a file that was cut short, damaged, or
changed by a program that keeps arrays which it does not know (sd-scripts does) is not taken for what it was.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import time
import uuid
import zipfile
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Size = tuple[int, int]  # width, height
Stamp = tuple[int, int, int]  # bytes, mtime and ctime in nanoseconds

FINGERPRINT = "dreamfolder_fingerprint"  # the note in an .npz (an array of bytes) and in a safetensors header
OWN_ENDING = ".safetensors"
NPZ_ENDING = ".npz"

_UNREADABLE = (
    OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError, RuntimeError,
    NotImplementedError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_DTYPES = {"F32": np.float32, "F16": np.float16}
_FIRST_READ = 4096  # more than the header of a file of ours
_LONGEST_HEADER = 1 << 20
_LONGEST_NAME = 240  # bytes; file systems take 255
_TEMPORARY = ".latents-"
_LEFT_BEHIND_AFTER = 24 * 3600.0  # seconds
_SETTLED_AFTER = 2_000_000_000  # nanoseconds: the coarsest clock of a file system (FAT)


class FilePrint(NamedTuple):
    """A file's content (BLAKE2b, hex), and the stamp that it had while it was read.

    A later file of the same stamp has the same content, so that it need not be read again. That holds because the stamp
    has the time of the last change of any kind (ctime), which programs cannot set back as they can the mtime, and
    because a file that was changed less than 2 s before it was read gets no stamp (None): it may change once more
    within one tick of the file system's clock. Windows has no such time (its ctime is that of creation), so there a
    image that is replaced in place by one of the same size, and given the old mtime on purpose, goes unnoticed.
    """

    content: str
    stamp: Stamp | None

    @classmethod
    def take(cls, path: str) -> FilePrint:
        """Read a file. Raises OSError."""
        now = time.time_ns()
        before = stamp(path)
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
        settled = now - max(before[1:]) > _SETTLED_AFTER and before == stamp(path)
        return cls(content, before if settled else None)

    def again(self, path: str) -> FilePrint:
        """The print of the same file now; it is only read if its stamp is another. Raises OSError."""
        return self if self.stamp is not None and self.stamp == stamp(path) else FilePrint.take(path)


def stamp(path: str) -> Stamp:
    """Size and times of a file. Raises OSError."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


@dataclass(frozen=True)
class Note:
    """What the arrays of a file are of. `settings` names all besides the files that they depend on; `sums` has the
    checksum of each array."""

    settings: str
    image: FilePrint
    mask: FilePrint | None
    sums: Mapping[str, int]

    @property
    def key(self) -> str:
        """Equal for equal latents and masks."""
        parts = (self.settings, self.image.content, self.mask.content if self.mask else None)
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def to_text(self) -> str:
        """As it stands in a file: JSON."""
        fields = {"settings": self.settings, "picture": self.image, "mask": self.mask, "sums": dict(self.sums)}
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    def of_text(cls, text: str | bytes) -> Note:
        """Back from to_text. Raises ValueError, KeyError or TypeError for anything else."""
        fields = json.loads(text)
        image, mask = fields["picture"], fields["mask"]
        return cls(fields["settings"], _print_of(image), _print_of(mask) if mask else None, fields["sums"])


def _print_of(fields: list[Any]) -> FilePrint:
    content, found = fields
    return FilePrint(str(content), None if found is None else (int(found[0]), int(found[1]), int(found[2])))


@dataclass(frozen=True)
class Entry:
    """What was read of a file. `note` is None for a file of another program."""

    arrays: dict[str, Array]
    note: Note | None


def read(path: str, names: Collection[str] | None = None) -> Entry | None:
    """The arrays of those names, or all; a name that is not there is left out. None if the file is missing, cut short
    or damaged, or if an array is not the one that the note was written for."""
    try:
        arrays, note = _read_npz(path, names) if path.endswith(NPZ_ENDING) else _read_own(path, names)
        if note is not None and any(note.sums[name] != checksum(name, array) for name, array in arrays.items()):
            return None
        return Entry(arrays, note)
    except _UNREADABLE:
        return None


def shapes(path: str) -> tuple[dict[str, tuple[int, ...]], Note | None] | None:
    """The arrays' shapes and the note, of ours without reading the arrays; None as in `read`. Nothing is verified."""
    try:
        if path.endswith(NPZ_ENDING):
            arrays, note = _read_npz(path, None)
            return {name: array.shape for name, array in arrays.items()}, note
        with open(path, "rb") as file:
            places, note, start = _header(file)
            end = max((int(place["data_offsets"][1]) for place in places.values()), default=0)
            if os.fstat(file.fileno()).st_size != start + end:
                return None
            return {name: tuple(place["shape"]) for name, place in places.items()}, note
    except _UNREADABLE:
        return None


def _read_own(path: str, names: Collection[str] | None) -> tuple[dict[str, Array], Note | None]:
    arrays = {}
    with open(path, "rb") as file:
        places, note, start = _header(file)
        for name, place in places.items():
            if names is not None and name not in names:
                continue
            first, end = place["data_offsets"]
            data = bytearray(end - first)  # writable, as torch wants it
            file.seek(start + first)
            if file.readinto(data) != len(data):
                raise EOFError(path)
            arrays[name] = np.frombuffer(data, _DTYPES[place["dtype"]]).reshape(place["shape"])
    return arrays, note


def _header(file: Any) -> tuple[dict[str, Any], Note | None, int]:
    """Places of the arrays, the note, and where the arrays begin."""
    begin = file.read(_FIRST_READ)
    length = int.from_bytes(begin[:8], "little")
    if len(begin) < 8 or length > _LONGEST_HEADER:
        raise ValueError("not a safetensors file")
    text = begin[8 : 8 + length]
    if len(text) < length:
        text += file.read(length - len(text))
    places = json.loads(text)
    return places, Note.of_text(places.pop("__metadata__")[FINGERPRINT]), 8 + length


def _read_npz(path: str, names: Collection[str] | None) -> tuple[dict[str, Array], Note | None]:
    with np.load(path, allow_pickle=False) as stored:
        note = Note.of_text(stored[FINGERPRINT].item()) if FINGERPRINT in stored.files else None
        wanted = [name for name in stored.files if name != FINGERPRINT and (names is None or name in names)]
        return {name: stored[name] for name in wanted}, note


def checksum(name: str, array: Array) -> int:
    """CRC-32 of an array's name, shape, type and bytes."""
    about = repr((name, tuple(array.shape), array.dtype.str)).encode()
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, zlib.crc32(about))


def write(path: str, arrays: Mapping[str, Array], settings: str, image: FilePrint, mask: FilePrint | None) -> Note:
    """Write a file whole or not at all: a temporary one beside it takes its name when it is complete, whoever else
    reads or writes it meanwhile. The ending of the name decides the format. Raises OSError."""
    note = Note(settings, image, mask, {name: checksum(name, array) for name, array in arrays.items()})
    data = _npz_bytes(arrays, note) if path.endswith(NPZ_ENDING) else _own_bytes(arrays, note)
    temporary = os.path.join(os.path.dirname(path), f"{_TEMPORARY}{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        _rename(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return note


def _own_bytes(arrays: Mapping[str, Array], note: Note) -> bytes:
    from safetensors.numpy import save

    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return bytes(save(contiguous, {FINGERPRINT: note.to_text()}))


def _npz_bytes(arrays: Mapping[str, Array], note: Note) -> bytes:
    stored: dict[str, Any] = {**arrays, FINGERPRINT: np.array(note.to_text().encode())}
    file = io.BytesIO()
    np.savez(file, **stored)
    return file.getvalue()


def _rename(temporary: str, path: str) -> None:
    for waited in range(20):
        try:
            os.replace(temporary, path)
            return
        except PermissionError:
            # Windows does not replace a file while another process reads it, which takes milliseconds
            if os.name != "nt" or waited == 19:
                raise
            time.sleep(0.05)


def sweep(folder: str) -> None:
    """Remove the temporary files of processes that were killed, a day later: no write takes as long."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                old = entry.name.startswith(_TEMPORARY) and entry.name.endswith(".tmp")
                if old and time.time() - entry.stat().st_mtime > _LEFT_BEHIND_AFTER:
                    os.unlink(entry.path)
    except OSError:
        return  # somebody else's turn


def own_name(image: str, bucket: Size, settings: str, suffix: str) -> str:
    """The name of our file for an image's file name: cat.png_512x768_1f3870be_sd.safetensors."""
    return _fitted(image, f"_{bucket[0]}x{bucket[1]}_{settings[:8]}{suffix.removesuffix(NPZ_ENDING)}{OWN_ENDING}")


def npz_name(image: str, size: Size, suffix: str) -> str:
    """The name that sd-scripts gives: stem and size of the image, suffix of the family: cat_1024x1536_sd.npz."""
    return _fitted(os.path.splitext(image)[0], f"_{size[0]:04d}x{size[1]:04d}{suffix}")


def full_npz_name(image: str, size: Size, bucket: Size, settings: str, suffix: str) -> str:
    """An .npz name for what has to share npz_name: a.png beside a.jpg, or one image at several resolutions.

    It ends in the image's own size, from which sd-scripts would tell it: cat.png_512x768_1f3870be_1024x1536_sd.npz.
    """
    own = f"_{bucket[0]}x{bucket[1]}_{settings[:8]}"
    return _fitted(image, f"{own}_{size[0]:04d}x{size[1]:04d}{suffix}")


def _fitted(name: str, ending: str) -> str:
    """Name and ending; of a name that is too long only the beginning, and a digest of the whole."""
    room = _LONGEST_NAME - len(os.fsencode(ending))
    whole = name.encode("utf-8", "surrogateescape")
    if len(whole) <= room:
        return name + ending
    digest = hashlib.blake2b(whole, digest_size=8).hexdigest()
    return whole[: room - 17].decode("utf-8", "ignore") + "~" + digest + ending
