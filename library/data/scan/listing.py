"""List the files of a folder with their lengths and mtimes in one pass."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from library.data.scan.index import Stamp


@dataclass(slots=True)
class Directory:
    """A folder without its sub-folders. Skips names that begin with a dot."""

    path: str  # absolute
    images: dict[str, Stamp] = field(default_factory=dict)
    texts: dict[str, Stamp] = field(default_factory=dict)  # files with caption extensions
    others: list[str] = field(default_factory=list)  # names of the other files
    folders: list[str] = field(default_factory=list)
    unusable_images: dict[str, str] = field(default_factory=dict)  # unusable files with image extensions -> reason
    unusable_texts: dict[str, str] = field(default_factory=dict)

    def names(self) -> Iterator[str]:
        """Names of all files that are not images."""
        yield from self.texts
        yield from self.others


class Directories:
    """Lists each folder once, however many subsets use it. `images`, `texts`: lower-case extensions to list."""

    def __init__(self, images: Collection[str], texts: Collection[str] = ()) -> None:
        self._images = frozenset(images)
        self._texts = tuple(texts)
        self._known: dict[str, Directory] = {}

    def get(self, path: str) -> Directory:
        """The folder with this absolute path. Raises OSError if it cannot be listed."""
        if path not in self._known:
            self._known[path] = list_directory(path, self._images, self._texts)
        return self._known[path]

    def below(self, root: str, *, recursive: bool) -> list[tuple[str, Directory]]:
        """(prefix, folder) of the root and, if recursive, of all its sub-folders; a prefix is "" or ends in "/".

        A link to a parent folder is not followed. Raises OSError if a folder cannot be listed.
        """
        found = [("", self.get(root))]
        if not recursive:
            return found
        seen = {os.path.realpath(root)}
        for prefix, directory in found:  # grows during the loop
            for name in sorted(directory.folders):
                path = os.path.join(directory.path, name)
                if (real := os.path.realpath(path)) not in seen:
                    seen.add(real)
                    found.append((f"{prefix}{name}/", self.get(path)))
        return found


def list_directory(path: str, images: Collection[str], texts: tuple[str, ...]) -> Directory:
    """List one folder. Raises OSError."""
    directory = Directory(path)
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if _is_folder(entry):
                directory.folders.append(name)
                continue
            is_image = name[name.rfind(".") :].lower() in images
            if not is_image and not name.lower().endswith(texts):
                directory.others.append(name)
                continue
            try:
                status = entry.stat()
                if not name.isascii():
                    name.encode("utf-8")
                if not stat.S_ISREG(status.st_mode):
                    raise OSError("not a file")
            except (OSError, UnicodeEncodeError) as error:
                (directory.unusable_images if is_image else directory.unusable_texts)[name] = _reason(entry, error)
            else:
                (directory.images if is_image else directory.texts)[name] = (status.st_size, status.st_mtime_ns)
    return directory


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _reason(entry: os.DirEntry[str], error: OSError | UnicodeEncodeError) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "its name is not valid in this system's encoding; rename it"
    if isinstance(error, FileNotFoundError):
        return "it is a broken link" if entry.is_symlink() else "it was deleted while the folder was being listed"
    return f"cannot be read ({error.strerror})" if error.strerror else str(error)


def stamp_of(path: str) -> Stamp | None:
    """Length and mtime of a file; None if it does not exist."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def is_image(name: str, extensions: Collection[str]) -> bool:
    """Whether a file name has an image extension."""
    return name[name.rfind(".") :].lower() in extensions and not name.startswith(".")


def stem(name: str) -> str:
    """A file name without its extension, which it must have."""
    return name[: name.rfind(".")]


def absolute(path: Path) -> str:
    """An absolute path, as in the keys of listings and of the index."""
    return os.path.abspath(path)


def is_below(path: str, root: str, paths: ModuleType = os.path) -> bool:
    """Whether an absolute path is in the folder `root` or is it, as written or where links lead. A path on another
    drive or in a network share is not looked at. `paths`: the system's rules."""
    root, path = (paths.normcase(paths.normpath(place)) for place in (root, path))
    try:
        if paths.commonpath([path, root]) == root:
            return True
        if paths.splitdrive(path)[0] != paths.splitdrive(root)[0]:
            return False
        root, path = paths.realpath(root), paths.realpath(path)
        return bool(paths.commonpath([path, root]) == root)
    except ValueError:  # another drive; a NUL within the path
        return False
