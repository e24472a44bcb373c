"""What earlier runs found out of the data, in one SQLite file: sizes of images, texts of captions and their lengths.

An entry holds as long as its file has the same length and the same time of change. All data sets of a cache folder
share one file, so images used at several resolutions or in several runs are read once. It keeps SQLite's default
journal and not the write-ahead log: that needs shared memory, which network drives do not give, and a scan writes only
what is new. Whatever goes wrong with the file, scanning goes on: a damaged one is made anew, others are done without.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from library.data.scan.image_headers import Header

Stamp = tuple[int, int]  # length in bytes, time of change in ns
Text = tuple[str, bool]  # a caption, and whether lines follow that are not used
Result = TypeVar("Result")

FILE_NAME = "pictures.sqlite"
VERSION = 2
_WAIT = 20.0  # seconds until another run's writing is over
_COARSEST = 2_000_000_000  # ns: FAT tells times of change in steps of two seconds
_MAKE = (
    "CREATE TABLE folders (id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE)",
    "CREATE TABLE headers (folder INTEGER NOT NULL, name TEXT NOT NULL, length INTEGER NOT NULL, "
    "changed INTEGER NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL, transparent INTEGER NOT NULL, "
    "PRIMARY KEY (folder, name)) WITHOUT ROWID",
    "CREATE TABLE captions (folder INTEGER NOT NULL, reading TEXT NOT NULL, name TEXT NOT NULL, "
    "length INTEGER NOT NULL, changed INTEGER NOT NULL, text TEXT NOT NULL, more INTEGER NOT NULL, "
    "PRIMARY KEY (folder, name, reading)) WITHOUT ROWID",
    "CREATE TABLE lengths (counter INTEGER NOT NULL, text INTEGER NOT NULL, length INTEGER NOT NULL, "
    "PRIMARY KEY (counter, text)) WITHOUT ROWID",
    f"PRAGMA user_version = {VERSION}",
)
_DAMAGED = {"SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_ERROR", "SQLITE_MISMATCH", "SQLITE_SCHEMA"}


class Index:
    """A context: opened on entering, closed on leaving. `trouble` says why it is not used, or "".

    Without a folder it remembers nothing. Files changed within two seconds of its opening are not remembered: a second
    change could leave both length and time as they are.
    """

    def __init__(self, folder: Path | None) -> None:
        self.trouble = ""
        self._path = None if folder is None else folder / FILE_NAME
        self._base: sqlite3.Connection | None = None
        self._read_only = False
        self._settled = time.time_ns() - _COARSEST
        self._shared: dict[tuple[int, int, int], Header] = {}

    def __enter__(self) -> Index:
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                self.trouble = str(error)
            else:
                self._with_base(lambda base: None, None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._close()

    def headers(self, folder: str, stamps: Mapping[str, Stamp]) -> dict[str, Header]:
        """What is known of the images in a folder (absolute path) whose stamps have not changed. Entries of names
        that are not in `stamps` are forgotten."""
        known: dict[str, Header] = {}
        gone: list[str] = []
        question = (
            "SELECT name, length, changed, width, height, transparent FROM headers "
            "WHERE folder = (SELECT id FROM folders WHERE path = ?)"
        )
        for name, length, changed, width, height, transparent in self._ask(question, (folder,)):
            stamp = stamps.get(name)
            if stamp is None:
                gone.append(name)
            elif stamp[0] == length and stamp[1] == changed:
                key = (width, height, transparent)
                header = self._shared.get(key)
                if header is None:
                    header = self._shared[key] = Header((width, height), bool(transparent))
                known[name] = header
        self._forget("headers", folder, gone)
        return known

    def captions(
        self, folder: str, reading: str, stamps: Mapping[str, Stamp], others: Collection[str] = ()
    ) -> dict[str, Text]:
        """The same for caption files. `reading` names how they were read: encoding and lines. `others`: names that are
        there too and not forgotten, such as captions of another ending."""
        known: dict[str, Text] = {}
        gone: list[str] = []
        question = (
            "SELECT name, length, changed, text, more FROM captions "
            "WHERE folder = (SELECT id FROM folders WHERE path = ?) AND reading = ?"
        )
        for name, length, changed, text, more in self._ask(question, (folder, reading)):
            stamp = stamps.get(name)
            if stamp is None:
                gone.append(name)
            elif stamp[0] == length and stamp[1] == changed:
                known[name] = (text, bool(more))
        if gone:
            there = frozenset(others)
            self._forget("captions", folder, [name for name in gone if name not in there])
        return known

    def keep_headers(self, folder: str, found: Iterable[tuple[str, Stamp, Header]]) -> None:
        """Remember what was read from images."""
        rows = [
            (name, *stamp, *header.size, header.transparent)
            for name, stamp, header in found
            if stamp[1] < self._settled
        ]
        self._write(folder, f"INSERT OR REPLACE INTO headers VALUES ({_THIS}, ?, ?, ?, ?, ?, ?)", rows)

    def keep_captions(self, folder: str, reading: str, found: Iterable[tuple[str, Stamp, Text]]) -> None:
        """Remember what was read from caption files."""
        rows = [(reading, name, *stamp, *text) for name, stamp, text in found if stamp[1] < self._settled]
        self._write(folder, f"INSERT OR REPLACE INTO captions VALUES ({_THIS}, ?, ?, ?, ?, ?, ?)", rows)

    def lengths(self, counter: int) -> dict[int, int]:
        """Text -> its length as this counter counts; both by a number that stands for them."""
        return dict(self._ask("SELECT text, length FROM lengths WHERE counter = ?", (counter,)))

    def keep_lengths(self, counter: int, found: Mapping[int, int]) -> None:
        """Remember lengths."""
        if found:
            rows = [(counter, text, length) for text, length in found.items()]
            self._insert(("INSERT OR REPLACE INTO lengths VALUES (?, ?, ?)", rows))

    def _forget(self, table: str, folder: str, names: list[str]) -> None:
        self._write(folder, f"DELETE FROM {table} WHERE folder = {_THIS} AND name = ?", [(name,) for name in names])

    def _ask(self, question: str, values: tuple[str | int, ...]) -> list[tuple[Any, ...]]:
        return self._with_base(lambda base: base.execute(question, values).fetchall(), [])

    def _write(self, folder: str, order: str, rows: list[tuple[Any, ...]]) -> None:
        if rows:
            named = ("INSERT OR IGNORE INTO folders (path) VALUES (?)", [(folder,)])
            self._insert(named, (order, [(folder, *row) for row in rows]))

    def _insert(self, *orders: tuple[str, Sequence[tuple[Any, ...]]]) -> None:
        def write(base: sqlite3.Connection) -> None:
            with _at_once(base):
                for order, rows in orders:
                    base.executemany(order, rows)

        if not self._read_only:
            self._with_base(write, None)

    def _with_base(self, act: Callable[[sqlite3.Connection], Result], otherwise: Result) -> Result:
        """Act on the open file; a damaged one is made anew and acted on again. On other errors, `otherwise`."""
        for again in (True, False):
            if self._path is None or (self.trouble and not self._read_only):
                break
            try:
                if self._base is None:
                    self._base = _connect(self._path)
                return act(self._base)
            except UnicodeEncodeError:
                break  # a path that is no text cannot be remembered
            except sqlite3.Error as error:
                if not (again and self._mend(self._path, error)):
                    break
        return otherwise

    def _mend(self, path: Path, error: sqlite3.Error) -> bool:
        """Remove the file if it is damaged, so that it can be made anew; else note the trouble."""
        # an error without a code comes from Python: text in the file that is not UTF-8
        name = getattr(error, "sqlite_errorname", "SQLITE_CORRUPT")
        if name.startswith("SQLITE_READONLY") and self._base is not None:
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
        except OSError as refused:
            self.trouble = f"it is damaged and cannot be removed: {refused}"
            return False
        return True

    def _close(self) -> None:
        if self._base is not None:
            with contextlib.suppress(sqlite3.Error):
                self._base.close()
            self._base = None


_THIS = "(SELECT id FROM folders WHERE path = ?)"


@contextlib.contextmanager
def _at_once(base: sqlite3.Connection) -> Iterator[None]:
    """All or nothing. The lock to write is taken at the start, where waiting for another run cannot fail."""
    base.execute("BEGIN IMMEDIATE")
    try:
        yield
        base.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            base.execute("ROLLBACK")
        raise


def _connect(path: Path) -> sqlite3.Connection:
    """The open file with this version's tables."""
    base = sqlite3.connect(path, timeout=_WAIT, isolation_level=None)
    try:
        if _version(base) != VERSION:
            with _at_once(base):
                if _version(base) != VERSION:  # another run may have been faster
                    for table in ("folders", "headers", "captions", "lengths"):
                        base.execute(f"DROP TABLE IF EXISTS {table}")
                    for order in _MAKE:
                        base.execute(order)
    except BaseException:
        base.close()
        raise
    return base


def _version(base: sqlite3.Connection) -> int:
    return int(base.execute("PRAGMA user_version").fetchone()[0])
