"""An index of image sizes, masks, captions and their lengths in one SQLite file, so that later runs need not read them.

An entry is valid while its file has the same length and mtime. All datasets of a cache folder share one index, so
images used at several resolutions or in several runs are read once. It uses SQLite's default journal: the write-ahead
log needs shared memory, which network drives lack, and a scan writes only new entries. Errors never stop a scan: a
damaged index is created again, and an inaccessible one is not used.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from library.data.scan.image_headers import Header

Stamp = tuple[int, int]  # length in bytes, mtime in ns
Text = tuple[str, bool]  # a caption, and whether unused lines follow
Result = TypeVar("Result")

FILE_NAME = "pictures.sqlite"
VERSION = 5
_TIMEOUT = 20.0  # seconds to wait for another run to finish writing
_COARSEST = 2_000_000_000  # ns: FAT stores mtimes in steps of two seconds
_CREATE = (
    "CREATE TABLE folders (id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE)",
    "CREATE TABLE headers (folder INTEGER NOT NULL, name TEXT NOT NULL, length INTEGER NOT NULL, "
    "changed INTEGER NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL, transparent INTEGER NOT NULL, "
    "profile TEXT NOT NULL, animated INTEGER NOT NULL, PRIMARY KEY (folder, name)) WITHOUT ROWID",
    "CREATE TABLE masks (folder INTEGER NOT NULL, transparency INTEGER NOT NULL, name TEXT NOT NULL, "
    "length INTEGER NOT NULL, changed INTEGER NOT NULL, mean REAL NOT NULL, least INTEGER NOT NULL, "
    "most INTEGER NOT NULL, coloured INTEGER NOT NULL, PRIMARY KEY (folder, name, transparency)) WITHOUT ROWID",
    "CREATE TABLE captions (folder INTEGER NOT NULL, reading TEXT NOT NULL, name TEXT NOT NULL, "
    "length INTEGER NOT NULL, changed INTEGER NOT NULL, text TEXT NOT NULL, more INTEGER NOT NULL, "
    "PRIMARY KEY (folder, name, reading)) WITHOUT ROWID",
    "CREATE TABLE lengths (counter INTEGER NOT NULL, text INTEGER NOT NULL, length INTEGER NOT NULL, "
    "PRIMARY KEY (counter, text)) WITHOUT ROWID",
    f"PRAGMA user_version = {VERSION}",
)
_DAMAGED = {"SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_ERROR", "SQLITE_MISMATCH", "SQLITE_SCHEMA"}


class MaskValues(NamedTuple):
    """The values of a mask, 0 to 255: their mean as a share of 255, the least and the most. `coloured`: not grey."""

    mean: float
    least: int
    most: int
    coloured: bool = False


class Index:
    """A context manager that opens and closes the index. `trouble` is why it cannot be used, or "".

    Without a folder it stores nothing. Files modified less than two seconds before it was opened are not stored:
    another change might leave both length and mtime equal.
    """

    def __init__(self, folder: Path | None) -> None:
        self.trouble = ""
        self._path = None if folder is None else folder / FILE_NAME
        self._database: sqlite3.Connection | None = None
        self._read_only = False
        self._unambiguous_before = time.time_ns() - _COARSEST
        self._shared: dict[tuple[int, int, int, str, int], Header] = {}

    def __enter__(self) -> Index:
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as failure:
                self.trouble = str(failure)
            else:
                self._run(lambda database: None, None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._close()

    def headers(self, folder: str, stamps: Mapping[str, Stamp]) -> dict[str, Header]:
        """Headers of the images in a folder (absolute path) whose stamps have not changed. Deletes the entries of names
        not in `stamps`."""
        known: dict[str, Header] = {}
        deleted: list[str] = []
        query = (
            "SELECT name, length, changed, width, height, transparent, profile, animated FROM headers "
            "WHERE folder = (SELECT id FROM folders WHERE path = ?)"
        )
        for name, length, changed, width, height, transparent, profile, animated in self._query(query, (folder,)):
            stamp = stamps.get(name)
            if stamp is None:
                deleted.append(name)
            elif stamp[0] == length and stamp[1] == changed:
                key = (width, height, transparent, profile, animated)
                header = self._shared.get(key)
                if header is None:
                    header = self._shared[key] = Header((width, height), bool(transparent), profile, bool(animated))
                known[name] = header
        self._delete("headers", folder, deleted)
        return known

    def masks(self, folder: str, transparency: bool, stamps: Mapping[str, Stamp]) -> dict[str, MaskValues]:  # noqa: FBT001
        """The same for masks in a folder: mask files, or images whose transparency is their mask. Deletes no entry."""
        query = (
            "SELECT name, length, changed, mean, least, most, coloured FROM masks "
            "WHERE folder = (SELECT id FROM folders WHERE path = ?) AND transparency = ?"
        )
        return {
            name: MaskValues(mean, least, most, bool(coloured))
            for name, length, changed, mean, least, most, coloured in self._query(query, (folder, transparency))
            if stamps.get(name) == (length, changed)
        }

    def captions(
        self, folder: str, reading: str, stamps: Mapping[str, Stamp], others: Collection[str] = ()
    ) -> dict[str, Text]:
        """The same for caption files. `reading` is how they are read: encoding and lines. Entries of names in `others`,
        such as captions with another extension, are not deleted."""
        known: dict[str, Text] = {}
        deleted: list[str] = []
        query = (
            "SELECT name, length, changed, text, more FROM captions "
            "WHERE folder = (SELECT id FROM folders WHERE path = ?) AND reading = ?"
        )
        for name, length, changed, text, more in self._query(query, (folder, reading)):
            stamp = stamps.get(name)
            if stamp is None:
                deleted.append(name)
            elif stamp[0] == length and stamp[1] == changed:
                known[name] = (text, bool(more))
        if deleted:
            present = frozenset(others)
            self._delete("captions", folder, [name for name in deleted if name not in present])
        return known

    def store_headers(self, folder: str, found: Iterable[tuple[str, Stamp, Header]]) -> None:
        """Store headers of images."""
        rows = [
            (name, *stamp, *header.size, header.transparent, header.profile, header.animated)
            for name, stamp, header in found
            if stamp[1] < self._unambiguous_before
        ]
        self._write(folder, f"INSERT OR REPLACE INTO headers VALUES ({_FOLDER_ID}, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def store_masks(self, folder: str, transparency: bool, found: Iterable[tuple[str, Stamp, MaskValues]]) -> None:  # noqa: FBT001
        """Store values of masks."""
        rows = [
            (transparency, name, *stamp, *values)
            for name, stamp, values in found
            if stamp[1] < self._unambiguous_before
        ]
        self._write(folder, f"INSERT OR REPLACE INTO masks VALUES ({_FOLDER_ID}, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def store_captions(self, folder: str, reading: str, found: Iterable[tuple[str, Stamp, Text]]) -> None:
        """Store caption texts."""
        rows = [(reading, name, *stamp, *text) for name, stamp, text in found if stamp[1] < self._unambiguous_before]
        self._write(folder, f"INSERT OR REPLACE INTO captions VALUES ({_FOLDER_ID}, ?, ?, ?, ?, ?, ?)", rows)

    def lengths(self, counter: int) -> dict[int, int]:
        """Text -> length by this counter; counter and text are given by their hashes."""
        return dict(self._query("SELECT text, length FROM lengths WHERE counter = ?", (counter,)))

    def store_lengths(self, counter: int, found: Mapping[int, int]) -> None:
        """Store caption lengths."""
        if found:
            rows = [(counter, text, length) for text, length in found.items()]
            self._insert(("INSERT OR REPLACE INTO lengths VALUES (?, ?, ?)", rows))

    def _delete(self, table: str, folder: str, names: list[str]) -> None:
        self._write(
            folder, f"DELETE FROM {table} WHERE folder = {_FOLDER_ID} AND name = ?", [(name,) for name in names]
        )

    def _query(self, query: str, values: tuple[str | int, ...]) -> list[tuple[Any, ...]]:
        return self._run(lambda database: database.execute(query, values).fetchall(), [])

    def _write(self, folder: str, statement: str, rows: list[tuple[Any, ...]]) -> None:
        if rows:
            folder_row = ("INSERT OR IGNORE INTO folders (path) VALUES (?)", [(folder,)])
            self._insert(folder_row, (statement, [(folder, *row) for row in rows]))

    def _insert(self, *statements: tuple[str, Sequence[tuple[Any, ...]]]) -> None:
        def write(database: sqlite3.Connection) -> None:
            with _transaction(database):
                for statement, rows in statements:
                    database.executemany(statement, rows)

        if not self._read_only:
            self._run(write, None)

    def _run(self, act: Callable[[sqlite3.Connection], Result], default: Result) -> Result:
        """Call `act` with the open database; a damaged one is created again. On other errors, return `default`."""
        for may_retry in (True, False):
            if self._path is None or (self.trouble and not self._read_only):
                break
            try:
                if self._database is None:
                    self._database = _connect(self._path)
                return act(self._database)
            except UnicodeEncodeError:
                break  # a path that is not Unicode cannot be stored
            except sqlite3.Error as error:
                if not (may_retry and self._recover(self._path, error)):
                    break
        return default

    def _recover(self, path: Path, error: sqlite3.Error) -> bool:
        """Delete the file if it is damaged, so that it is created again; else set `trouble`."""
        # an error without a code is from Python: text in the file is not UTF-8
        name = getattr(error, "sqlite_errorname", "SQLITE_CORRUPT")
        if name.startswith("SQLITE_READONLY") and self._database is not None:
            self._read_only = True
            self.trouble = str(error)
            return False
        self._close()
        if name not in _DAMAGED and not name.startswith("SQLITE_CORRUPT"):
            self.trouble = str(error)
            return False
        try:
            for ending in ("", "-journal"):
                path.with_name(path.name + ending).unlink(missing_ok=True)
        except OSError as failure:
            self.trouble = f"it is damaged and cannot be deleted: {failure}"
            return False
        return True

    def _close(self) -> None:
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
            self._database = None


_FOLDER_ID = "(SELECT id FROM folders WHERE path = ?)"


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    """A transaction. It takes the write lock at its start, so that waiting for another run cannot fail later."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            database.execute("ROLLBACK")
        raise


def _connect(path: Path) -> sqlite3.Connection:
    """Open the file and create the tables of this version."""
    database = sqlite3.connect(path, timeout=_TIMEOUT, isolation_level=None)
    try:
        if _version(database) != VERSION:
            with _transaction(database):
                if _version(database) != VERSION:  # another run may have been faster
                    for table in ("folders", "headers", "masks", "captions", "lengths"):
                        database.execute(f"DROP TABLE IF EXISTS {table}")
                    for statement in _CREATE:
                        database.execute(statement)
    except BaseException:
        database.close()
        raise
    return database


def _version(database: sqlite3.Connection) -> int:
    return int(database.execute("PRAGMA user_version").fetchone()[0])
