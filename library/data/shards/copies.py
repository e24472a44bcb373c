"""Whole copies of remote shards on the local disk, a limited number of them.

With a shard buffer, all images of a shard are read soon after each other: then one copy of a gigabyte is quicker than
thousands of requests. Processes need not know of each other: who creates the lock file copies; the others read their
images by request until the copy is complete. The copies that were used longest ago are deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from library.whole_files import remove_leftovers, replacing, write_text

_ENDING = ".tar"
_LOCK = ".lock"
_ABANDONED = 1800.0  # seconds after which the lock of a process that died is no longer respected
_FAILED = "failed"  # the file of a folder that is written when a copy fails
_PAUSE = 300.0  # seconds in which nothing more is copied into a folder, after a copy that failed


@dataclass(frozen=True, slots=True)
class Copies:
    """A folder of copies, at most `most` of them. `version`: of the shards; copies of others are not used."""

    folder: str
    most: int
    version: str = ""

    def read(self, url: str, offset: int, length: int) -> bytes | None:
        """Bytes of the shard from its copy, which is made if no other process is making it. None if there is no copy
        yet, or none can be written. Raises OSError."""
        path = self._path(url)
        if (data := _read(path, offset, length)) is not None:
            return data
        if self._is_paused():
            return None  # else each image would copy until the disk is full again
        with self._lock(path) as is_mine:
            if not is_mine or not self._copy(url, path):
                return None
        return _read(path, offset, length)

    def _path(self, url: str) -> Path:
        return Path(
            self.folder, hashlib.blake2b(f"{self.version} {url}".encode(), digest_size=16).hexdigest() + _ENDING
        )

    def _copy(self, url: str, path: Path) -> bool:
        """Copy a shard. False for a full disk, or a request that fails."""
        from library.data.shards.remote import copy_to

        self._make_room()
        try:
            with replacing(path) as stream:
                copy_to(url, stream)
        except OSError:
            with contextlib.suppress(OSError):
                write_text(Path(self.folder, _FAILED), "")
            return False
        return True

    def _is_paused(self) -> bool:
        """Whether a copy into this folder failed a short time ago, here or in another process."""
        with contextlib.suppress(OSError):
            return time.time() - Path(self.folder, _FAILED).stat().st_mtime < _PAUSE
        return False

    def _make_room(self) -> None:
        """Delete what killed processes left, and the copies that were used longest ago. One that is being read stays
        where the system keeps it."""
        remove_leftovers(self.folder)
        found: list[tuple[float, Path]] = []
        for path in Path(self.folder).glob(f"*{_ENDING}"):
            with contextlib.suppress(OSError):
                found.append((path.stat().st_mtime, path))
        for _, path in sorted(found)[: max(0, len(found) + 1 - self.most)]:
            with contextlib.suppress(OSError):
                path.unlink()

    @contextlib.contextmanager
    def _lock(self, path: Path) -> Iterator[bool]:
        """Whether this process is the one to copy."""
        lock = path.with_name(path.name + _LOCK)
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                if time.time() - lock.stat().st_mtime > _ABANDONED:
                    lock.unlink()
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except OSError:  # another process has it; or the folder cannot be written
            yield False
            return
        try:
            yield True
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()


def _read(path: Path, offset: int, length: int) -> bytes | None:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return data
