"""One entry of a data backend file: typed access to its keys, their lines, and notes about it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from library.options.convert_values import BadValue, format_value
from library.options.dataset_config.keys import folder
from library.options.dataset_config.locate import Address
from library.options.dataset_config.source import ConfigFile
from library.options.dataset_config.tables import LONGEST
from library.options.mistakes import Mistakes


@dataclass(frozen=True)
class Entry:
    """A table of the file. Its methods return None (or empty, or false) for a key that is missing, null or "".

    A value of a wrong type is a mistake and counts as missing.
    """

    source: ConfigFile
    at: Address
    name: str  # the id of the entry, or its number if it has none
    values: Mapping[str, object]
    mistakes: Mistakes

    @property
    def origin(self) -> str:
        """Location for messages: file, line and name."""
        return f'{self.source.origin(self.at)}, "{self.name}"'

    def has_value(self, key: str) -> bool:
        """Whether the key has a value."""
        return self.values.get(key) not in (None, "")

    def reject(self, key: str, fault: str, remedy: str) -> None:
        """Add a mistake about the value of a key, or about a missing key."""
        name = ".".join(str(part) for part in (*self.at[1:], key))
        value = f" = {_short(self.values[key])}" if key in self.values else ""
        where = self.source.origin((*self.at, key))
        self.mistakes.add(f'{name}{value} ({where}, "{self.name}") {fault}', remedy)

    def text(self, key: str) -> str | None:
        """The text of a key."""
        value = self.values.get(key)
        if value is None or isinstance(value, str):
            return value or None
        self.reject(key, "is not a text", "write a text in quotes")
        return None

    def texts(self, key: str) -> list[str]:
        """A text or a list of texts, stripped, without empty ones."""
        value = self.values.get(key)
        members = value if isinstance(value, list) else [] if value is None else [value]
        texts = [member.strip() for member in members if isinstance(member, str)]
        if len(texts) < len(members):
            self.reject(key, "is neither a text nor a list of texts", "write a text in quotes")
            return []
        return [text for text in texts if text]

    def folder(self, key: str) -> Path | str | None:
        """A required path or URL; a missing one is a mistake."""
        if not self.has_value(key):
            self.reject(key, "is missing", "write the path of the folder")
            return None
        try:
            return folder(self.values[key])
        except BadValue as bad:
            self.reject(key, bad.fault, bad.remedy)
            return None

    def number(self, key: str) -> float | None:
        """An integer or a float."""
        value = self.values.get(key)
        if value is None or value == "":
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            self.reject(key, "is not a number", "write a number without quotes")
            return None
        return value

    def switch(self, key: str) -> bool:
        """true or false; false if missing."""
        value = self.values.get(key)
        if value is None or value == "":
            return False
        if not isinstance(value, bool):
            self.reject(key, "is neither true nor false", "write true or false, without quotes")
        return value is True

    def choice(self, key: str, choices: Sequence[str], remedy: str = "") -> str | None:
        """One of the texts in `choices`. `remedy` is for an unsupported text; without it the choices are named."""
        value = self.text(key)
        if value is None or value in choices:
            return value
        near = difflib.get_close_matches(value, choices, 1, 0.6)
        suggestion = f"did you mean {near[0]}?" if near else f"write one of {', '.join(choices)}"
        self.reject(key, "is not supported" if remedy else "is not one of its values", remedy or suggestion)
        return None

    def table(self, key: str, keys: Sequence[str]) -> Entry | None:
        """A nested table; keys other than `keys` are mistakes."""
        value = self.values.get(key)
        if value is None or value == "":
            return None
        if not isinstance(value, dict):
            self.reject(key, "is not a table", 'write { "name": value, ... }')
            return None
        inner = Entry(self.source, (*self.at, key), self.name, value, self.mistakes)
        for unknown in [name for name in value if name not in keys]:
            near = difflib.get_close_matches(unknown, keys, 1, 0.6)
            inner.reject(unknown, "is not one of its keys", f"did you mean {near[0]}?" if near else "remove it")
        return inner


@dataclass
class Notes:
    """Notes about a file; a note about several entries is written once, with their names."""

    file: str
    _found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, text: str, entry: Entry | None = None) -> None:
        """Add a note about an entry, or about the whole file."""
        names = self._found.setdefault(text, [])
        if entry is not None and entry.name not in names:
            names.append(entry.name)

    def lines(self) -> tuple[str, ...]:
        """The notes in the order they were added."""
        return tuple(
            f"{self.file}{' (' + ', '.join(names) + ')' if names else ''}: {text}"
            for text, names in self._found.items()
        )


def _short(value: object) -> str:
    text = "null" if value is None else format_value(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
