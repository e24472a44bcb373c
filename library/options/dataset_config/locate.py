"""Find the line of each value in a TOML or JSON file, which tomllib and json do not report but messages need.

Both locators expect text that the real parser has accepted, so they only split it into its parts. If they cannot
follow it they stop, and later values get the line of the last enclosing table they found.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from json import JSONDecodeError, JSONDecoder

from library.bounded import toml_of

Address = tuple[str | int, ...]
"""Path of keys and list indexes from the top of the file to a value: ("datasets", 0, "subsets", 2, "is_reg")."""


@dataclass(frozen=True)
class Places:
    """The line (from 1) of every value of a file, and the keys that a table has more than once."""

    lines: Mapping[Address, int]
    duplicates: tuple[
        tuple[Address, int], ...
    ] = ()  # address and line of the later one; only in JSON, as TOML forbids it

    def line(self, address: Address) -> int:
        """The line of a value, or of the nearest enclosing table if it is not in the file."""
        while address and address not in self.lines:
            address = address[:-1]
        return self.lines.get(address, 1)


def in_toml(text: str) -> Places:
    """Lines of a TOML text: for a table that of its header, for any other value that of its key."""
    reader = _Toml(text)
    with suppress(_Lost, IndexError):
        reader.read()
    return Places(reader.lines)


def in_json(text: str) -> Places:
    """Lines of a JSON text: for a member of an object that of its name, for a list item that of its start."""
    reader = _Json(text)
    with suppress(JSONDecodeError, IndexError):
        reader.read()
    return Places(reader.lines, tuple(reader.duplicates))


class _Lost(Exception):
    """There is no value where one is required."""


class _Lines:
    """Converts offsets to line numbers."""

    def __init__(self, text: str) -> None:
        self._starts = [match.end() for match in re.finditer("\n", text)]

    def of(self, offset: int) -> int:
        return bisect_right(self._starts, offset) + 1


_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BLANK_IN_LINE = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_ONE_LINE_STRING = re.compile(r'"(?:[^"\\]|\\.)*"' + r"|'[^']*'")
# Up to two quotes may directly precede the closing three.
_LONG_STRING = re.compile(r'"""(?:[^\\]|\\.)*?"""(?:"{1,2})?' + r"|'''.*?'''(?:'{1,2})?", re.DOTALL)
_SCALAR = re.compile(r"[^,\]}#\r\n]+")


@dataclass
class _Toml:
    text: str
    at: int = 0
    lines: dict[Address, int] = field(default_factory=dict)
    counts: dict[Address, int] = field(default_factory=dict)  # tables of each array of tables so far

    def read(self) -> None:
        line_of = _Lines(self.text)
        table: Address = ()
        self._skip(_BLANK)
        while self.at < len(self.text):
            start = line_of.of(self.at)
            if self.text[self.at] == "[":
                table = self._header(start)
            else:
                self._statement(table, line_of)
            self._skip(_BLANK)

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        if match is None:
            return ""
        self.at = match.end()
        return match.group()

    def _header(self, line: int) -> Address:
        """Read [a.b] or [[a.b]] and return the address of the table it opens."""
        many = self.text.startswith("[[", self.at)
        self.at += 2 if many else 1
        *outer, last = self._key()
        self.at += 2 if many else 1
        table: Address = ()
        for name in outer:
            table = (*table, name)
            self.lines.setdefault(table, line)
            if table in self.counts:
                table = (*table, self.counts[table] - 1)
        table = (*table, last)
        if many:
            self.lines.setdefault(table, line)
            self.counts[table] = self.counts.get(table, 0) + 1
            table = (*table, self.counts[table] - 1)
        self.lines[table] = line  # replaces the line of an implied table by that of its own header
        return table

    def _key(self) -> list[str]:
        """The parts of a dotted key; moves past it and the spaces after it."""
        names = []
        while True:
            self._skip(_BLANK_IN_LINE)
            quoted = self._skip(_ONE_LINE_STRING)
            names.append(str(toml_of(f"k = {quoted}")["k"]) if quoted else self._skip(_BARE_KEY))
            self._skip(_BLANK_IN_LINE)
            if self.text[self.at] != ".":
                return names
            self.at += 1

    def _statement(self, table: Address, line_of: _Lines) -> None:
        """Read name = value, at top level or in an inline table."""
        line = line_of.of(self.at)
        for name in self._key():
            table = (*table, name)
            self.lines.setdefault(table, line)
        self.at += 1  # the equals sign
        self._skip(_BLANK_IN_LINE)
        self._value(table, line_of)

    def _value(self, address: Address, line_of: _Lines) -> None:
        opening = self.text[self.at]
        if opening in "\"'":
            if not self._skip(_LONG_STRING):
                self._skip(_ONE_LINE_STRING)
        elif opening in "[{":
            self._members(address, line_of, "]" if opening == "[" else "}")
        elif not self._skip(_SCALAR):
            raise _Lost

    def _members(self, address: Address, line_of: _Lines, closing: str) -> None:
        self.at += 1
        place = 0
        self._skip(_BLANK)
        while self.text[self.at] != closing:
            if closing == "]":
                self.lines[(*address, place)] = line_of.of(self.at)
                self._value((*address, place), line_of)
                place += 1
            else:
                self._statement(address, line_of)
            self._skip(_BLANK)
            if self.text[self.at] == ",":
                self.at += 1
            self._skip(_BLANK)
        self.at += 1


_JSON_BLANK = re.compile(r"[ \t\r\n]*")
_DECODER = JSONDecoder()


@dataclass
class _Json:
    text: str
    at: int = 0
    lines: dict[Address, int] = field(default_factory=dict)
    duplicates: list[tuple[Address, int]] = field(default_factory=list)

    def read(self) -> None:
        self._blanks()
        self._value((), _Lines(self.text))

    def _blanks(self) -> None:
        match = _JSON_BLANK.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def _scalar(self) -> object:
        value: object
        value, self.at = _DECODER.raw_decode(self.text, self.at)
        return value

    def _value(self, address: Address, line_of: _Lines) -> None:
        opening = self.text[self.at]
        if opening == "{":
            self._object(address, line_of)
        elif opening == "[":
            self._list(address, line_of)
        else:
            self._scalar()

    def _object(self, address: Address, line_of: _Lines) -> None:
        self.at += 1
        self._blanks()
        seen: set[str] = set()
        while self.text[self.at] != "}":
            line = line_of.of(self.at)
            name = str(self._scalar())
            if name in seen:
                self.duplicates.append(((*address, name), line))
            seen.add(name)
            self.lines[(*address, name)] = line
            self._blanks()
            self.at += 1  # the colon
            self._blanks()
            self._value((*address, name), line_of)
            self._next()
        self.at += 1

    def _list(self, address: Address, line_of: _Lines) -> None:
        self.at += 1
        self._blanks()
        place = 0
        while self.text[self.at] != "]":
            self.lines[(*address, place)] = line_of.of(self.at)
            self._value((*address, place), line_of)
            place += 1
            self._next()
        self.at += 1

    def _next(self) -> None:
        """Move past spaces and the comma after a member."""
        self._blanks()
        if self.text[self.at] == ",":
            self.at += 1
            self._blanks()
