"""The table of shards: an SQLite file with one row per image, so that a plan reads no shard and a run keeps no list.

SQLite is in Python, finds one row of ten million by its number, is read by any number of processes at once, and can be
looked at with any SQLite program. The table names its shards relative to a folder that the user chooses, never by
absolute paths or URLs, so a table cannot make a run read other files. Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import pathname2url

from library.data.scan.index import MaskValues
from library.data.scan.metadata_files import MOST_SCORE
from library.messages import shortened
from library.options.mistakes import Mistake, UserError
from library.whole_files import replacing

VERSION = 1
MAKE_IT = "make the table with tools/make_shards.py"
_CHUNK = 512  # rows read at a time
_CONTENT = re.compile("[0-9a-f]{32}")
_APPLICATION = 0x44465348  # "DFSH", SQLite's mark of a file of this kind
_COLUMNS = (
    ("name", "TEXT NOT NULL"),
    ("shard", "INTEGER NOT NULL"),
    ("offset", "INTEGER NOT NULL"),
    ("length", "INTEGER NOT NULL"),
    ("content", "BLOB NOT NULL"),
    ("width", "INTEGER NOT NULL"),
    ("height", "INTEGER NOT NULL"),
    ("transparent", "INTEGER NOT NULL"),
    ("profile", "TEXT NOT NULL"),
    ("animated", "INTEGER NOT NULL"),
    ("caption", "TEXT"),
    ("score", "REAL"),
    ("alpha", "TEXT"),
    ("mask", "TEXT"),
    ("mask_shard", "INTEGER"),
    ("mask_offset", "INTEGER"),
    ("mask_length", "INTEGER"),
    ("mask_content", "BLOB"),
    ("mask_values", "TEXT"),
)
_TYPES: dict[str, type] = {"TEXT": str, "INTEGER": int, "BLOB": bytes, "REAL": float}
_ALLOWED = [
    (name, (_TYPES[kind.split()[0]], type(None)) if "NOT NULL" not in kind else _TYPES[kind.split()[0]])
    for name, kind in _COLUMNS
]
_NAMES = ", ".join(name for name, _ in _COLUMNS)
_MARKS = ", ".join("?" for _ in _COLUMNS)


class Row(NamedTuple):
    """An image of the table. `caption`: all lines of its text, None without one; `alpha`: values of the opacity of an
    image that may be transparent; `mask`: name of its mask."""

    name: str  # path with "/", the same in every place
    shard: int
    offset: int
    length: int
    content: bytes
    width: int
    height: int
    transparent: bool
    profile: str
    animated: bool
    caption: str | None = None
    score: float | None = None
    alpha: MaskValues | None = None
    mask: str | None = None
    mask_shard: int | None = None
    mask_offset: int | None = None
    mask_length: int | None = None
    mask_content: bytes | None = None
    mask_values: MaskValues | None = None


class ShardEntry(NamedTuple):
    """A shard of the table: its number, its path relative to the folder of the shards, and its length in bytes."""

    number: int
    path: str
    length: int


class ShardTable:
    """A table that is read. Picklable: each process opens the file itself. Threads may share it."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for a file that is missing, damaged, or no table of shards."""
        self.path = path
        self._lock = threading.Lock()
        self._open: sqlite3.Connection | None = None
        if not path.is_file():
            raise UserError([Mistake(f"there is no table of shards {path}", MAKE_IT)])
        self._check()
        facts = dict(self._all("SELECT key, value FROM facts"))
        self.folder_name = str(facts.get("folder_name", ""))
        self.content = str(facts.get("content"))
        if not _CONTENT.fullmatch(self.content):  # it names a folder of caches
            raise self._damaged(ValueError("an impossible hash of its content"))
        shards = self._all("SELECT number, path, length FROM shards ORDER BY number")
        try:
            self.shards = tuple(ShardEntry(int(number), str(name), int(length)) for number, name, length in shards)
        except (TypeError, ValueError) as error:
            raise self._damaged(error) from error

    def __reduce__(self) -> tuple[type[ShardTable], tuple[Path]]:
        return ShardTable, (self.path,)

    def rows(self, numbers: Sequence[int] | None = None) -> Iterator[tuple[int, Row]]:
        """Rows with their numbers, in the order of their names: all, or those with these ascending numbers."""
        if numbers is None:
            start = 0
            while block := self._all(f"SELECT id, {_NAMES} FROM images WHERE id > ? ORDER BY id LIMIT {_CHUNK}", start):
                yield from ((number, self._row(rest)) for number, *rest in block)
                start = block[-1][0]
            return
        for begin in range(0, len(numbers), _CHUNK):
            some = numbers[begin : begin + _CHUNK]
            wanted = set(some)
            between = f"SELECT id, {_NAMES} FROM images WHERE id BETWEEN ? AND ? ORDER BY id"
            if some[-1] - some[0] > 8 * len(some):  # far apart
                yield from ((number, self.row(number)) for number in some)
                continue
            for number, *rest in self._all(between, some[0], some[-1]):
                if number in wanted:
                    yield number, self._row(rest)

    def row(self, number: int) -> Row:
        """One row."""
        found = self._all(f"SELECT {_NAMES} FROM images WHERE id = ?", number)
        if not found:
            raise UserError([Mistake(f"{self.path} was changed during the run", "start again")])
        return self._row(found[0])

    def __len__(self) -> int:
        return int(self._all("SELECT COUNT(*) FROM images")[0][0])

    def has_masks(self) -> bool:
        """Whether any image has a mask in the shards."""
        return bool(self._all("SELECT 1 FROM images WHERE mask IS NOT NULL LIMIT 1"))

    def _row(self, values: Sequence[Any]) -> Row:
        """A row as the table has it. Raises UserError for values that no table has."""
        try:
            for (column, allowed), value in zip(_ALLOWED, values, strict=True):
                if not isinstance(value, allowed):
                    raise TypeError(f"{column} is a {type(value).__name__}")
            row = Row(*values)
            mask = row.mask_shard, row.mask_offset, row.mask_length
            if not self._holds(row.shard, row.offset, row.length) or not (mask[0] is None or self._holds(*mask)):
                raise ValueError("a place outside the shards")
            if min(row.width, row.height) < 1:
                raise ValueError("an impossible size")
            if not is_inside(row.name) or not (row.mask is None or is_inside(row.mask)):
                raise ValueError("an impossible name")
            if row.score is not None and not 0 <= row.score <= MOST_SCORE:
                raise ValueError("an impossible score")
            return row._replace(
                transparent=bool(row.transparent),
                animated=bool(row.animated),
                alpha=_values(row.alpha),
                mask_values=_values(row.mask_values),
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise self._damaged(error) from error

    def _holds(self, shard: Any, offset: Any, length: Any) -> bool:
        """Whether these bytes are in a shard. Raises TypeError for what is no number."""
        return bool(0 <= shard < len(self.shards) and 0 <= offset and 0 <= length <= self.shards[shard].length - offset)

    def _check(self) -> None:
        kind, version = self._all("PRAGMA application_id")[0][0], self._all("PRAGMA user_version")[0][0]
        if kind != _APPLICATION:
            raise UserError([Mistake(f"{self.path} is not a table of shards", MAKE_IT)])
        # views and the like could have rows without end
        odd = self._all("SELECT name FROM sqlite_master WHERE type NOT IN ('table', 'index') OR sql LIKE '%VIRTUAL%'")
        if odd:
            raise self._damaged(ValueError(f"{shortened(str(odd[0][0]))} is no table"))
        if version != VERSION:
            what = f"{self.path} has version {version} of the format, and this program reads version {VERSION}"
            raise UserError([Mistake(what, f"{MAKE_IT} of this version")])

    def _all(self, query: str, *values: int) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                if self._open is None:
                    # immutable: no locks, which network drives may lack; nobody writes a table that exists
                    uri = f"file:{pathname2url(os.path.abspath(self.path))}?mode=ro&immutable=1"
                    self._open = sqlite3.connect(uri, uri=True, check_same_thread=False)
                return self._open.execute(query, values).fetchall()
        except (sqlite3.Error, UnicodeError) as error:  # names of tables that are no text
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> UserError:
        return UserError([Mistake(f"the table of shards {self.path} is damaged ({error})", f"{MAKE_IT} again")])


def is_inside(name: str) -> bool:
    """Whether a relative path with "/" stays below its folder, on every system. Not for text that is not Unicode."""
    if any("\ud800" <= character <= "\udfff" for character in name):
        return False
    parts = name.replace("\\", "/").split("/")
    # a drive anywhere in a path: Windows begins there again when it joins the parts
    return "\0" not in name and not any(part in ("", ".", "..") or part[1:2] == ":" for part in parts)


def write_table(path: Path, folder_name: str, shards: Iterable[ShardEntry], rows: Iterable[Row]) -> int:
    """Write a table, complete or not at all, and return the number of its rows. Of rows with one name the first counts.
    Reads `rows` before `shards`. Raises OSError."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, path.name)
        try:
            count = _build(built, folder_name, shards, rows)
        except sqlite3.Error as error:  # a full disk
            raise OSError(f"{built}: {error}") from error
        with built.open("rb") as source, replacing(path) as stream:
            shutil.copyfileobj(source, stream)
    return count


def _build(path: Path, folder_name: str, shards: Iterable[ShardEntry], rows: Iterable[Row]) -> int:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")
        columns = ", ".join(f"{name} {kind}" for name, kind in _COLUMNS)
        database.execute(f"CREATE TEMP TABLE packed ({columns}, UNIQUE (name))")
        database.execute("BEGIN")
        database.executemany(f"INSERT OR IGNORE INTO packed ({_NAMES}) VALUES ({_MARKS})", map(_stored, rows))
        database.execute("CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        database.execute("CREATE TABLE shards (number INTEGER PRIMARY KEY, path TEXT, length INTEGER)")
        database.executemany("INSERT INTO shards VALUES (?, ?, ?)", shards)
        database.execute(f"CREATE TABLE images (id INTEGER PRIMARY KEY, {columns})")
        database.execute(f"INSERT INTO images ({_NAMES}) SELECT {_NAMES} FROM packed ORDER BY name")
        digest, count = hashlib.blake2b(digest_size=16), 0
        for name, content, mask in database.execute("SELECT name, content, mask_content FROM images ORDER BY id"):
            digest.update(repr((name, content, mask)).encode())
            count += 1
        facts = {"folder_name": folder_name, "content": digest.hexdigest()}
        database.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
        database.execute(f"PRAGMA application_id = {_APPLICATION}")
        database.execute(f"PRAGMA user_version = {VERSION}")
        database.execute("COMMIT")
        return count


def _stored(row: Row) -> tuple[Any, ...]:
    caption = (
        None if row.caption is None else row.caption.encode("utf-8", "replace").decode()
    )  # JSON has half characters
    texts: dict[str, Any] = {"alpha": _text(row.alpha), "mask_values": _text(row.mask_values), "caption": caption}
    return tuple(row._replace(**texts))


def _text(values: MaskValues | None) -> str | None:
    return None if values is None else f"{values.mean!r} {values.least} {values.most} {int(values.coloured)}"


def _values(text: Any) -> MaskValues | None:
    if text is None:
        return None
    mean, least, most, coloured = text.split()
    values = MaskValues(float(mean), int(least), int(most), coloured == "1")
    if not (0 <= values.mean <= 1 and 0 <= values.least <= values.most <= 255):
        raise ValueError("impossible values of a mask")
    return values
