"""A lock on the files of a run: no two runs write files of one name in one folder.

It is a lock of the operating system on a small file beside them, and ends with its process, however that ends:
there is no number of a process to be mistaken for another's. Data workers do not inherit it. It holds between machines
on NFS and SMB; where a file system has no locks, the run goes on and says so.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from library.bounded import read_json
from library.options.mistakes import Mistake, UserError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_HELD = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}
_FAR = 1 << 30  # the locked byte: Windows lets nobody read what is locked
REMEDY = "wait until it ends, stop it, or use another --output_name or --output_dir"


@contextlib.contextmanager
def writing_alone(folder: Path, name: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock on the files `name` in `folder` while this is open. A folder that is made for it and stays empty is
    removed again. Raises UserError if another run has it, and for a folder that cannot be written."""
    path = lock_file(folder, name)
    try:
        made = [each for each in (path.parent, *path.parent.parents) if not each.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, problem = _open_locked(path)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            what = f"another run{_holder(path)} is writing {name} in --output_dir {folder}"
            raise UserError([Mistake(what, REMEDY)]) from error
        what = f"--output_dir {folder} cannot be written: {error.strerror or error}"
        raise UserError([Mistake(what, "use another folder, or make this one writable")]) from error
    if problem:
        say(f"{folder} has no locks ({problem}): start no second run with --output_name {name} there")
    try:
        yield
    finally:
        if os.name == "posix":  # while it is locked, so that nobody else's is removed
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)
        else:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                path.unlink()
        with contextlib.suppress(OSError):  # one that is not empty any more
            for each in made:
                each.rmdir()


def lock_file(folder: Path, name: str) -> Path:
    """The file that is locked: `.NAME.lock`."""
    target = folder / name
    return target.with_name(f".{target.name}.lock")


def _open_locked(path: Path) -> tuple[int, str]:
    """Open the file, lock it and write into it who has it; with it, why it could not be locked, if so. Raises OSError;
    BlockingIOError if another process has the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            problem = _lock(descriptor)
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                with contextlib.suppress(OSError):  # a full disk: the lock is what counts
                    os.ftruncate(descriptor, 0)
                    os.lseek(descriptor, 0, os.SEEK_SET)
                    os.write(descriptor, _about_this_process())
                return descriptor, problem
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner ended, and removed it, meanwhile


def _lock(descriptor: int) -> str:
    """Lock a file for this process; why this file system cannot, if so. Raises BlockingIOError."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, _FAR, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            # of this process only: flock would live on in data workers that outlive it
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise BlockingIOError(error.errno, error.strerror) from error
        return error.strerror or str(error)
    return ""


def _about_this_process() -> bytes:
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    return json.dumps({"process": os.getpid(), "machine": socket.gethostname(), "since": started}).encode()


def _holder(path: Path) -> str:
    """Who has the lock, as far as its file tells."""
    try:
        found = read_json(path)
        return f" (process {int(found['process'])} on {found['machine']}, since {found['since']})"
    except (OSError, ValueError, LookupError, TypeError):
        return ""
