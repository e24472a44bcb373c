"""Write files and folders whole or not at all: under a temporary name beside the target, flushed to disk, then renamed.

Whoever reads the target meanwhile, or after a crash, finds the old content or the new one. While a temporary file or
folder is written, its writer holds a lock of the operating system on it. A lock ends with its process, however that
ends, so `remove_leftovers` can tell what was left over from what another process is writing, also on another machine.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

if os.name == "posix":
    import fcntl

_POSIX = os.name == "posix"
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{12}\.dreamfolder-(?P<kind>tmp|old)", re.DOTALL)
_LONGEST_NAME = 200  # bytes of the target's name in a temporary one; file systems allow 255 with the rest
_ABANDONED_AFTER = 24 * 3600.0  # seconds without a change, where the file system has no locks: no write takes that long
_SETTLED_AFTER = 60.0  # the same on Windows, where a file that is open cannot be removed; for a folder 24 times that
_ATTEMPTS, _APART = 20, 0.05  # seconds, to replace a file that another process is reading on Windows
_NO_SYNC = {errno.EINVAL, errno.ENOSYS, getattr(errno, "ENOTSUP", errno.EINVAL)}  # of file systems without fsync


@contextlib.contextmanager
def replacing(path: Path | str, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Yield a binary stream whose content replaces `path` if the block succeeds; otherwise `path` is unchanged.

    Missing parent folders are created. Without `durable` the folder is not flushed: after a power cut the new name may
    be missing, though no file is ever damaged; for many small files that can be made again. Raises OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stream, temporary = _begin_file(path)
    try:
        with stream:
            yield stream
            stream.flush()
            _flush(stream.fileno())
            if _POSIX:  # renamed while it is locked
                os.replace(temporary, path)
        if not _POSIX:  # there an open file cannot be renamed
            _rename(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    if durable:
        flush_folder(path.parent)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder that replaces the folder `path` if the block succeeds; otherwise `path` is unchanged.

    Its files must be written by `replacing`. A process that is killed while the folders change places leaves both under
    temporary names: `remove_leftovers` completes the change. Raises OSError.
    """
    with folder_beside(path) as new:
        old = new.with_name(f"{new.name.removesuffix('tmp')}old")
        try:
            yield new
            flush_folder(new)
            try:
                if path.exists():
                    _rename(path, old)
                _rename(new, path)
            except BaseException:  # Ctrl-C too
                if old.exists() and not path.exists():
                    os.replace(old, path)
                raise
        finally:
            if path.exists():  # never the only copy
                shutil.rmtree(old, ignore_errors=True)
    flush_folder(path.parent)


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, which goes with the block; if this process is killed, by `remove_leftovers`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _temporary(path, "tmp")
    new.mkdir()
    lock = _lock_folder(new)
    try:
        yield new
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(new, ignore_errors=True)


def write_text(path: Path | str, text: str) -> None:
    """Write a text file (UTF-8, line ends unchanged) atomically. Raises OSError."""
    with replacing(path) as stream:
        stream.write(text.encode("utf-8"))


def is_temporary(path: Path | str) -> bool:
    """Whether a file or folder has the name of one that is being written, or was left over."""
    return _TEMPORARY.fullmatch(os.path.basename(path)) is not None


def remove_leftovers(folder: Path | str, *, only: str | None = None) -> list[str]:
    """Remove the temporary files and folders of processes that were killed from a folder, not from those in it. What
    another process is writing is left alone. `only`: those of the target with this name.

    Returns lines for the log. A folder that cannot be listed, or a file that cannot be removed, is passed over.
    """
    found: list[tuple[Path, Path, bool]] = []  # temporary, target, whether it is the one that was replaced
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = _TEMPORARY.fullmatch(entry.name)
            if match is not None and (only is None or match["name"] == shortened(only)):
                path = Path(entry.path)
                found.append((path, path.with_name(match["name"]), match["kind"] == "old"))
    lines = []
    for path, target, is_old in sorted(found, key=lambda each: (not each[2], each[0])):  # the old ones tell of the new
        if is_old and _settle_old(path, target):
            lines.append(f"{target}: put in place, as a process was killed while it replaced it")
        elif not is_old and _remove_abandoned(path):
            lines.append(f"removed what a killed process left of {target}")
    return lines


def flush_folder(folder: Path) -> None:
    """Make renames in a folder durable; only possible, and only needed, on POSIX systems."""
    if not _POSIX:
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def shortened(name: str) -> str:
    """The name of a target as it stands in temporary names."""
    whole = os.fsencode(name)
    return name if len(whole) <= _LONGEST_NAME else whole[:_LONGEST_NAME].decode("utf-8", "ignore")


def _temporary(path: Path, kind: str) -> Path:
    return path.with_name(f".{shortened(path.name)}.{uuid.uuid4().hex[:12]}.dreamfolder-{kind}")


def _begin_file(path: Path) -> tuple[BinaryIO, Path]:
    """A new temporary file, locked by this process as long as it is open."""
    while True:
        temporary = _temporary(path, "tmp")
        stream = temporary.open("xb")
        _lock(stream.fileno())
        if temporary.exists():  # not removed by another process before it was locked
            return stream, temporary
        stream.close()


def _lock_folder(folder: Path) -> int | None:
    """Lock a folder of ours as long as the descriptor is open; None where that is not possible."""
    if not _POSIX:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    _lock(descriptor)
    return descriptor


def _lock(descriptor: int) -> bool | None:
    """Lock an open file for this process. False: another has; None: not on this file system."""
    if not _POSIX:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _flush(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _rename(source: Path, target: Path) -> None:
    for attempt in range(_ATTEMPTS):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            # Windows cannot replace a file that another process is reading, which takes milliseconds
            if _POSIX or attempt == _ATTEMPTS - 1:
                raise
            time.sleep(_APART)


def _remove_abandoned(path: Path) -> bool:
    """Remove a temporary file or folder unless its writer lives."""
    try:
        with _abandoned(path, 24 * _SETTLED_AFTER if path.is_dir() else _SETTLED_AFTER) as is_abandoned:
            if is_abandoned and path.is_dir():
                shutil.rmtree(path)
            elif is_abandoned:
                path.unlink()
            return is_abandoned
    except OSError:  # another process removed it, or it may not be removed
        return False


def _settle_old(old: Path, target: Path) -> bool:
    """Complete the change of two folders: whether the new one, or the old one if there is no new one, was put in place.
    The old one is removed if there is another."""
    try:
        new, put = old.with_name(old.name.removesuffix("old") + "tmp"), False
        if not target.exists():
            if len(os.fsencode(target.name)) > _LONGEST_NAME - 4:
                return False  # perhaps not its whole name
            if not new.exists():
                os.replace(old, target)
                return True
            with _abandoned(new, _SETTLED_AFTER) as is_abandoned:
                if not is_abandoned:
                    return False
                os.replace(new, target)  # it was complete before the old one moved
            put = True
        shutil.rmtree(old, ignore_errors=True)
        return put
    except OSError:
        return False


@contextlib.contextmanager
def _abandoned(path: Path, settled: float) -> Iterator[bool]:
    """Whether the writer of a temporary file or folder is dead; it is locked in this context. `settled`: seconds
    without a change after which it is, on Windows."""
    if not _POSIX:
        yield _age(path) > settled
        return
    # a file is opened for writing, as NFS locks no other
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        locked = _lock(descriptor)
        yield locked is True or (locked is None and _age(path) > _ABANDONED_AFTER)
    finally:
        os.close(descriptor)


def _age(path: Path) -> float:
    """Seconds since the last change of a file, or of anything in a folder."""
    newest = path.stat().st_mtime
    for each in path.rglob("*") if path.is_dir() else ():
        newest = max(newest, each.stat().st_mtime)
    return time.time() - newest
