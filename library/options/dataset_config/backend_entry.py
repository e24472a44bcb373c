"""One entry of a data backend file: its keys with the types they must have, where it stands, and notes about it."""

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
    """A table of the file. Its methods give None (or their kind of nothing) for a key that is not there or says
    nothing (null, ""); a value of another kind is a mistake, and then given as if it were not there."""

    source: ConfigFile
    at: Address
    name: str  # the id of the entry, a number for one without
    values: Mapping[str, object]
    mistakes: Mistakes

    @property
    def origin(self) -> str:
        """Where it stands, for people."""
        return f'{self.source.origin(self.at)}, "{self.name}"'

    def has_value(self, key: str) -> bool:
        """Whether the key is there and says something."""
        return self.values.get(key) not in (None, "")

    def add_mistake(self, key: str, fault: str, remedy: str) -> None:
        """Keep a mistake about the value of a key, or about one that is missing."""
        name = ".".join(str(part) for part in (*self.at[1:], key))
        value = f" = {_short(self.values[key])}" if key in self.values else ""
        where = self.source.origin((*self.at, key))
        self.mistakes.add(f'{name}{value} ({where}, "{self.name}") {fault}', remedy)

    def text(self, key: str) -> str | None:
        """A text."""
        value = self.values.get(key)
        if value is None or isinstance(value, str):
            return value or None
        self.add_mistake(key, "is not a text", "write a text in quotes")
        return None

    def texts(self, key: str) -> list[str]:
        """A text or a list of texts, stripped, without the empty ones."""
        value = self.values.get(key)
        members = value if isinstance(value, list) else [] if value is None else [value]
        texts = [member.strip() for member in members if isinstance(member, str)]
        if len(texts) < len(members):
            self.add_mistake(key, "is neither a text nor a list of texts", "write a text in quotes")
            return []
        return [text for text in texts if text]

    def folder(self, key: str) -> Path | str | None:
        """A path or a URL, required: a mistake if it is not there."""
        if not self.has_value(key):
            self.add_mistake(key, "is missing", "write the path of the folder")
            return None
        try:
            return folder(self.values[key])
        except BadValue as bad:
            self.add_mistake(key, bad.fault, bad.remedy)
            return None

    def number(self, key: str) -> float | None:
        """A number, whole or not."""
        value = self.values.get(key)
        if value is None or value == "":
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            self.add_mistake(key, "is not a number", "write a number without quotes")
            return None
        return value

    def switch(self, key: str) -> bool:
        """true or false, false if not there."""
        value = self.values.get(key)
        if value is None or value == "":
            return False
        if not isinstance(value, bool):
            self.add_mistake(key, "is neither true nor false", "write true or false, without quotes")
        return value is True

    def choice(self, key: str, choices: Sequence[str], remedy: str = "") -> str | None:
        """One of some texts. `remedy`: what to do about a text that is not among them."""
        value = self.text(key)
        if value is None or value in choices:
            return value
        near = difflib.get_close_matches(value, choices, 1, 0.6)
        listed = f"did you mean {near[0]}?" if near else f"write one of {', '.join(choices)}"
        self.add_mistake(key, "is not supported" if remedy else "is not one of its values", remedy or listed)
        return None

    def table(self, key: str, keys: Sequence[str]) -> Entry | None:
        """A table inside this one; keys other than `keys` are mistakes in it."""
        value = self.values.get(key)
        if value is None or value == "":
            return None
        if not isinstance(value, dict):
            self.add_mistake(key, "is not a table", 'write { "name": value, ... }')
            return None
        inner = Entry(self.source, (*self.at, key), self.name, value, self.mistakes)
        for unknown in [name for name in value if name not in keys]:
            near = difflib.get_close_matches(unknown, keys, 1, 0.6)
            inner.add_mistake(unknown, "is not one of its keys", f"did you mean {near[0]}?" if near else "remove it")
        return inner


@dataclass
class Notes:
    """What to tell about a file: what holds for several entries is told once, with their names."""

    file: str
    _found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, text: str, entry: Entry | None = None) -> None:
        """Keep a note about an entry, or about the whole file."""
        names = self._found.setdefault(text, [])
        if entry is not None and entry.name not in names:
            names.append(entry.name)

    def lines(self) -> tuple[str, ...]:
        """The notes, in the order they came up."""
        return tuple(
            f"{self.file}{' (' + ', '.join(names) + ')' if names else ''}: {text}"
            for text, names in self._found.items()
        )


def _short(value: object) -> str:
    text = "null" if value is None else format_value(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
