"""Which files a folder holds, with their lengths and times of change: one pass of the system's directory listing."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from library.data.scan.index import Stamp


@dataclass(slots=True)
class Directory:
    """One folder without what lies in its sub-folders. Names that begin with a dot are the system's and left out."""

    path: str  # absolute
    images: dict[str, Stamp] = field(default_factory=dict)
    texts: dict[str, Stamp] = field(default_factory=dict)  # files with the endings of captions
    others: list[str] = field(default_factory=list)  # names of the other files
    folders: list[str] = field(default_factory=list)
    lost_images: dict[str, str] = field(default_factory=dict)  # what only its name says to be one, and why not
    lost_texts: dict[str, str] = field(default_factory=dict)

    def names(self) -> Iterator[str]:
        """Of all files that are no images."""
        yield from self.texts
        yield from self.others


class Directories:
    """Folders listed once, however many subsets use them. `images`, `texts`: lower-case endings of files that are
    looked at."""

    def __init__(self, images: Collection[str], texts: Collection[str] = ()) -> None:
        self._images = frozenset(images)
        self._texts = tuple(texts)
        self._known: dict[str, Directory] = {}

    def one(self, path: str) -> Directory:
        """The folder of this absolute path. Raises OSError if it cannot be listed."""
        if path not in self._known:
            self._known[path] = list_directory(path, self._images, self._texts)
        return self._known[path]

    def below(self, root: str, *, recursive: bool) -> list[tuple[str, Directory]]:
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


def list_directory(path: str, images: Collection[str], texts: tuple[str, ...]) -> Directory:
    """List one folder. Raises OSError."""
    found = Directory(path)
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if _is_folder(entry):
                found.folders.append(name)
                continue
            is_image = name[name.rfind(".") :].lower() in images
            if not is_image and not name.lower().endswith(texts):
                found.others.append(name)
                continue
            try:
                status = entry.stat()
                if not name.isascii():
                    name.encode("utf-8")
                if not stat.S_ISREG(status.st_mode):
                    raise OSError("not a file")
            except (OSError, UnicodeEncodeError) as error:
                (found.lost_images if is_image else found.lost_texts)[name] = _why(entry, error)
            else:
                (found.images if is_image else found.texts)[name] = (status.st_size, status.st_mtime_ns)
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _why(entry: os.DirEntry[str], error: OSError | UnicodeEncodeError) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "its name is not text in this system's encoding; rename it"
    if isinstance(error, FileNotFoundError):
        return "a link that leads nowhere" if entry.is_symlink() else "it vanished while the folder was being listed"
    return f"cannot be read ({error.strerror})" if error.strerror else str(error)


def stamp_of(path: str) -> Stamp | None:
    """Length and time of change of a file; None if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def is_image(name: str, extensions: Collection[str]) -> bool:
    """Whether a file of this name is one, judged by its ending."""
    return name[name.rfind(".") :].lower() in extensions and not name.startswith(".")


def stem(name: str) -> str:
    """A name without its ending, which it must have."""
    return name[: name.rfind(".")]


def absolute(path: Path) -> str:
    """As the keys of listings and of the index are written."""
    return os.path.abspath(path)
