"""Write and read the tar archives of shards. Imports no torch."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from library.data.shards.table import ShardEntry, is_inside
from library.limits import CAPTION_FILE
from library.messages import without_secrets
from library.options.convert_values import is_remote
from library.options.mistakes import Mistake, UserError
from library.whole_files import replacing

_BLOCK = 512  # of a tar archive
_PIECE = 1 << 20  # bytes read at once


@dataclass(frozen=True)
class Loaded:
    """A file in memory, used like the Path of a file."""

    data: bytes
    name: str

    def open(self, mode: str = "rb") -> io.BytesIO:
        """Its bytes."""
        return io.BytesIO(self.data)

    @property
    def suffix(self) -> str:
        """The extension with its point."""
        return PurePosixPath(self.name).suffix

    def __str__(self) -> str:
        return self.name


class Place(NamedTuple):
    """Where a file is in the shards."""

    shard: int
    offset: int


class ShardWriter:
    """Writes shards of at most `limit` bytes, and at least one sample each, into a folder: NAME-000000.tar and so on.

    Each is written under a temporary name and renamed when it is complete. The same files give the same bytes.
    """

    def __init__(self, folder: Path, name: str, limit: int) -> None:
        self.entries: list[ShardEntry] = []
        self._folder, self._name, self._limit = folder, name, limit
        self._writing = ExitStack()
        self._file: BinaryIO | None = None
        self._tar: tarfile.TarFile | None = None
        self._path = Path()

    def add(self, files: Sequence[Loaded]) -> list[Place]:
        """Write the files of a sample into one shard. Raises OSError."""
        size = sum(_padded(len(file.data)) + _BLOCK for file in files)
        if self._file is None or (self._file.tell() and self._file.tell() + size > self._limit):
            self.close()
            self._begin()
        assert self._file is not None and self._tar is not None
        places = []
        for file in files:
            info = tarfile.TarInfo(file.name)
            info.size, info.mode, info.mtime = len(file.data), 0o644, 0
            self._tar.addfile(info, io.BytesIO(file.data))
            places.append(Place(len(self.entries), self._file.tell() - _padded(info.size)))
        return places

    def _begin(self) -> None:
        self._path = self._folder / f"{self._name}-{len(self.entries):06d}.tar"
        self._file = self._writing.enter_context(replacing(self._path))
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)

    def close(self) -> None:
        """Complete the last shard."""
        if self._file is None or self._tar is None:
            return
        self._tar.close()
        length = self._file.tell()
        self._file = None
        self._writing.close()
        self.entries.append(ShardEntry(len(self.entries), self._path.name, length))

    def abandon(self) -> None:
        """Remove the shard that is not complete."""
        self._file = None
        with suppress(_AbandonedError), self._writing:
            raise _AbandonedError


class _AbandonedError(Exception):
    """Ends the writing of a shard that is not complete."""


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


class Found(NamedTuple):
    """A file in a shard. `data` None: it is a text or another small file that is too large to be one."""

    name: str
    offset: int
    data: bytes | None


@dataclass
class Skipped:
    """What is in an archive and is not read: links and devices, and names outside of it."""

    links: int = 0
    outside: int = 0


@contextmanager
def open_shard(place: str) -> Iterator[BinaryIO]:
    """A shard by path or URL. Raises OSError."""
    if is_remote(place):
        from library.data.shards.remote import open_url

        with open_url(place) as remote:
            yield remote
        return
    with open(place, "rb") as file:
        yield file


class _InPieces:
    """A file whose reads allocate no more than it holds, whatever an archive's headers say of a member's size."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        """So many bytes, or fewer at the end."""
        pieces: list[bytes] = []
        while count > 0 and (piece := self._file.read(min(count, _PIECE))):
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)


def files_in(place: str, is_wanted: Sequence[str], is_text: Sequence[str], skipped: Skipped) -> Iterator[Found]:
    """The files of a shard with these lower-case endings, texts of at most CAPTION_FILE bytes. Raises UserError for a
    damaged archive, OSError for one that cannot be read."""
    try:
        with open_shard(place) as file:
            length = file.seek(0, io.SEEK_END)
            file.seek(0)
            with tarfile.TarFile(fileobj=_InPieces(file), mode="r") as tar:  # type: ignore[arg-type]
                for info in tar:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                    if info.size < 0:  # what follows would be this file again, without end
                        raise tarfile.ReadError(f"the size of {info.name} is negative")
                    name = info.name.removeprefix("./")
                    if info.isdir():
                        continue
                    if not info.isreg() or info.issparse():
                        skipped.links += 1
                    elif not is_inside(name):
                        skipped.outside += 1
                    elif name.lower().endswith((*is_wanted, *is_text)):
                        if info.size > length - info.offset_data:
                            raise tarfile.ReadError(f"unexpected end of data in {info.name}")
                        is_long = name.lower().endswith(tuple(is_text)) and info.size > CAPTION_FILE
                        yield Found(name, info.offset_data, None if is_long else _read(file, info))
                # tarfile takes a header that it cannot read, and the end of the file, for the end of the archive
                file.seek(tar.offset)
                if file.read(_BLOCK) != bytes(_BLOCK):
                    raise tarfile.ReadError("it has no end, or a damaged header")
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the last two for impossible numbers in a header
        what = f"shard {without_secrets(place)} is not a complete uncompressed tar archive ({error})"
        raise UserError([Mistake(what, "download or write it again")]) from error


def _read(file: BinaryIO, info: tarfile.TarInfo) -> bytes:
    file.seek(info.offset_data)
    return file.read(info.size)
