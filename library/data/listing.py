"""Which files a folder holds, with their lengths and times of change: one pass of the system's directory listing."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from library.data.index import Stamp


@dataclass(slots=True)
class Directory:
    """One folder without what lies in its sub-folders. Names that begin with a dot are the system's and left out."""

    path: str  # absolute
    stamps: dict[str, Stamp] = field(default_factory=dict)  # of the files with wanted endings
    others: list[str] = field(default_factory=list)  # names of the other files
    folders: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)  # wanted names that are no readable file, and why

    def names(self) -> Iterator[str]:
        """Of all files but the lost ones."""
        yield from self.stamps
        yield from self.others


class Directories:
    """Folders listed once, however many subsets use them. `wanted`: lower-case endings whose files are looked at."""

    def __init__(self, wanted: Collection[str]) -> None:
        self._wanted = frozenset(wanted)
        self._known: dict[str, Directory] = {}

    def one(self, path: str) -> Directory:
        """The folder of this absolute path. Raises OSError if it cannot be listed."""
        if path not in self._known:
            self._known[path] = list_directory(path, self._wanted)
        return self._known[path]

    def below(self, root: str, recursive: bool) -> list[tuple[str, Directory]]:
        """(prefix, folder) for the root and, if recursive, all folders below it; a prefix is "" or ends in "/".

        A folder that is linked into itself is listed once. Raises OSError if one cannot be listed.
        """
        found = [("", self.one(root))]
        if not recursive:
            return found
        seen = {os.path.realpath(root)}
        for prefix, directory in found:  # grows while it is walked
            for name in sorted(directory.folders):
                path = os.path.join(directory.path, name)
                if (real := os.path.realpath(path)) not in seen:
                    seen.add(real)
                    found.append((f"{prefix}{name}/", self.one(path)))
        return found


def list_directory(path: str, wanted: Collection[str]) -> Directory:
    """List one folder. Raises OSError."""
    found = Directory(path)
    others = tuple(ending for ending in wanted if ending.rfind(".") != 0)  # not what stands behind the last dot
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if _is_folder(entry):
                found.folders.append(name)
            elif name[name.rfind(".") :].lower() not in wanted and not name.lower().endswith(others):
                found.others.append(name)
            elif why := _look_at(entry, found.stamps):
                found.lost[name] = why
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _look_at(entry: os.DirEntry[str], stamps: dict[str, Stamp]) -> str:
    """Note the file's stamp. Why it cannot be used, or ""."""
    try:
        status = entry.stat()
        if not entry.name.isascii():
            entry.name.encode("utf-8")
    except UnicodeEncodeError:
        return "its name is not text in this system's encoding; rename it"
    except FileNotFoundError:
        return "a link that leads nowhere" if entry.is_symlink() else "it vanished while the folder was being listed"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if not stat.S_ISREG(status.st_mode):
        return "not a file"
    stamps[entry.name] = (status.st_size, status.st_mtime_ns)
    return ""


def stamp_of(path: str) -> Stamp | None:
    """Length and time of change of a file; None if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def is_picture(name: str, extensions: Collection[str]) -> bool:
    """Whether a file of this name is one, judged by its ending."""
    return name[name.rfind(".") :].lower() in extensions and not name.startswith(".")


def stem(name: str) -> str:
    """A name without its ending, which it must have."""
    return name[: name.rfind(".")]


def absolute(path: Path) -> str:
    """As the keys of listings and of the index are written."""
    return os.path.abspath(path)
