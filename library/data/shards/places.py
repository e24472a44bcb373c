"""Names of shards: patterns as in WebDataset, and where shards and table are. Imports no torch.

WebDataset writes several shards as one text: braces are expanded as in a shell, {000000..000099} or {train,test}, and
:: separates several such texts.
"""

from __future__ import annotations

import itertools
import math
import os
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path

from library.data.shards.member import TABLE_NAME
from library.limits import SHARDS
from library.messages import shortened
from library.options.convert_values import is_remote
from library.options.mistakes import Mistake, UserError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")
_ENDING = ".tar"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class Places:
    """Where shards are. `root`: their folder or its URL; `table`: path or URL of the table; `names`: of the shards that
    are used, relative to the root; None: all of the table."""

    root: str
    table: str
    names: tuple[str, ...] | None = None


def expand(text: str) -> list[str]:
    """The paths or URLs that a pattern stands for. Raises UserError for a pattern of too many."""
    found: list[str] = []
    for part in _split(text):
        pieces = _BRACES.split(part)  # literal, braces, literal, …
        count = math.prod(_count(piece) for piece in pieces[1::2])
        if count + len(found) > SHARDS:
            raise UserError(
                [Mistake(f'"{shortened(text)}" stands for more than {SHARDS} shards', "correct the braces")]
            )
        choices = [_choices(piece) if place % 2 else [piece] for place, piece in enumerate(pieces)]
        found += ["".join(chosen) for chosen in itertools.product(*choices)]
    return found


def _split(text: str) -> list[str]:
    """Split at ::, which also stands in URLs such as simplecache::s3://bucket/a.tar."""
    return [part for part in re.split(r"(?<=\.tar)::", text) if part]


def _count(braces: str) -> int:
    match = _RANGE.fullmatch(braces)
    return braces.count(",") + 1 if match is None else abs(int(match[2]) - int(match[1])) + 1


def _choices(braces: str) -> list[str]:
    match = _RANGE.fullmatch(braces)
    if match is None:
        return braces.split(",")
    first, last = int(match[1]), int(match[2])
    step = 1 if last >= first else -1
    return [str(number).zfill(len(match[1])) for number in range(first, last + step, step)]


def names_shards(text: str) -> bool:
    """Whether a text names shards, and not their folder."""
    return any(part.lower().endswith((_ENDING, *_COMPRESSED)) for part in _split(text))


def locate(text: str, table: str | None = None) -> Places:
    """The places that a user names: a folder or URL with shards and their table, or a pattern of shards, whose table is
    in their folder unless `table` names another. Raises UserError."""
    if not names_shards(text):
        root = text if is_remote(text) else os.path.abspath(text)
        return Places(root, table or join(root, TABLE_NAME))
    paths = expand(text)
    if wrong := next((path for path in paths if not path.lower().endswith(_ENDING)), None):
        remedy = "unpack it to .tar" if wrong.lower().endswith(_COMPRESSED) else "name only .tar files"
        raise UserError(
            [Mistake(f"{wrong} is not an uncompressed tar archive, of which single images can be read", remedy)]
        )
    folders = {folder_of(path) for path in paths}
    root = folders.pop() if len(folders) == 1 else common_folder([*folders])
    names = tuple(path[len(root) :].lstrip("/\\").replace(os.sep, "/") for path in map(_absolute, paths))
    return Places(root, table or join(root, TABLE_NAME), tuple(dict.fromkeys(names)))


def _absolute(path: str) -> str:
    return path if is_remote(path) else os.path.abspath(path)


def folder_of(path: str) -> str:
    """The folder or URL that a path or URL is in."""
    return posixpath.dirname(path) if is_remote(path) else os.path.dirname(os.path.abspath(path))


def common_folder(folders: list[str]) -> str:
    """The folder that all of these are in. Raises UserError if there is none."""
    try:
        if any(map(is_remote, folders)):
            shared = os.path.commonprefix([folder.split("/") for folder in folders])
            if len(shared) > 2:  # s3:, nothing, bucket
                return "/".join(shared)
        else:
            return os.path.commonpath(folders)
    except ValueError:  # different drives
        pass
    raise UserError(
        [Mistake(f"shards in {' and '.join(sorted(set(folders)))}", "use one folder for all shards of a table")]
    )


def join(root: str, name: str) -> str:
    """The path or URL of a file below a folder; `name` with "/"."""
    return f"{root.rstrip('/')}/{name}" if is_remote(root) else os.path.join(root, *name.split("/"))


def name_of(root: str) -> str:
    """The name of a folder or URL."""
    return root.rstrip("/").rpartition("/")[2] if is_remote(root) else Path(os.path.abspath(root)).name
