"""Files inside shards: tar archives with images, each read by its offset. Imports no torch.

A member of an uncompressed tar archive is a range of bytes, so an image is one read, in a local file or by URL. Each is
compared with its hash in the table of the shards, so that a shard that was changed or cut off gives an error that names
it, never another image.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from library.data.scan.index import MaskValues
from library.data.shards.copies import Copies
from library.messages import without_secrets
from library.options.convert_values import is_remote

TABLE_NAME = "shards.sqlite"
HASH_SIZE = 32  # bytes of BLAKE2b, as in the fingerprints of cached latents


def hash_of(data: bytes) -> bytes:
    """The hash of an image's bytes that the table holds."""
    return hashlib.blake2b(data, digest_size=HASH_SIZE).digest()


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar archive. `place`: its path or URL; `length` in bytes, by the table; `caches`: the folder of caches that are
    beside the image if an image is a file; `copies`: where copies of a remote shard are kept, None for no copies."""

    place: str
    length: int
    caches: str
    copies: Copies | None = None

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of a member. Raises OSError."""
        if not is_remote(self.place):
            with open(self.place, "rb") as file:
                file.seek(offset)
                data = file.read(length)
        elif (copied := None if self.copies is None else self.copies.read(self.place, offset, length)) is not None:
            data = copied
        else:
            from library.data.shards.remote import read_range

            data = read_range(self.place, offset, length)
        if len(data) < length:
            raise OSError("the shard ends before the end of this file: it is truncated")
        return data


@dataclass(frozen=True, slots=True)
class Member:
    """An image or mask in a shard, used like the Path of a file. `content`: hash of its bytes; `values`: of a mask
    those of its brightness, of an image those of its opacity."""

    shard: Shard
    name: str
    offset: int
    length: int
    content: bytes
    values: MaskValues | None = None

    def open(self, mode: Literal["rb"] = "rb") -> io.BytesIO:
        """Its bytes. Raises OSError for a shard that cannot be read or that is not the one of the table."""
        data = self.shard.read(self.offset, self.length)
        if hash_of(data) != self.content:
            raise OSError("its bytes are not those of the table: the shard was changed")
        return io.BytesIO(data)

    @property
    def suffix(self) -> str:
        """The extension with its point."""
        return PurePosixPath(self.name).suffix

    @property
    def cache_name(self) -> str:
        """A file name for its caches in the folder of the shard's caches."""
        return self.name.replace("%", "%25").replace("/", "%2F").replace("\\", "%5C").replace(":", "%3A")

    def __str__(self) -> str:
        stem = self.shard.place.rpartition("/")[2].removesuffix(".tar")
        return f"{without_secrets(self.shard.place)}/{self.name.removeprefix(f'{stem}/')}"
