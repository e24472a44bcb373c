"""Read raw options, not yet converted, from the command line and from a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.options.mistakes import Mistake, Mistakes, UserError
from library.options.text_files import OPTIONS, other_kind, read_text

COMMAND_LINE = "command line"
LIST_KINDS = ("list", "numbers", "paths")  # of flags that take several words


@dataclass(frozen=True)
class RawOption:
    """One option as written: name, unconverted value, and origin ("command line" or the file's name)."""

    name: str
    raw: object
    origin: str

    @property
    def holds_tables(self) -> bool:
        """Whether the value is a table or a list of tables, which no flag has."""
        members = self.raw if isinstance(self.raw, list) else [self.raw]
        return any(isinstance(member, dict) for member in members)


def read_command_line(
    argv: Sequence[str], kind_of: Callable[[str], str | None], mistakes: Mistakes
) -> Iterator[RawOption]:
    """Yield the options of a command line. `kind_of` returns the kind of a flag, None for an unknown one.

    A switch takes no value, a list all words up to the next flag, any other flag one word; --flag=value works for all.
    An unknown flag is yielded with the words after it, so that it is reported only once.
    """
    words = list(argv)
    place = 0
    while place < len(words):
        word = words[place]
        place += 1
        if not _is_flag(word):
            mistakes.add(f'"{word}" ({COMMAND_LINE}) belongs to no flag', _stray_word_remedy(words, place - 1, kind_of))
            continue
        name, equals, text = word[2:].partition("=")
        following = [] if equals else _values_after(words, place)
        kind = kind_of(name)
        if kind == "switch":
            yield RawOption(name, text if equals else True, COMMAND_LINE)
        elif kind in LIST_KINDS or kind is None:
            place += len(following)
            yield RawOption(name, [text] if equals else following, COMMAND_LINE)
        elif equals:
            yield RawOption(name, text, COMMAND_LINE)
        elif following:
            place += 1
            yield RawOption(name, following[0], COMMAND_LINE)
        else:
            mistakes.add(f"--{name} ({COMMAND_LINE}) has no value", f"write --{name} followed by its value ({kind})")


def _is_flag(word: str) -> bool:
    return word.startswith("--") and len(word) > 2


def _values_after(words: list[str], place: int) -> list[str]:
    end = place
    while end < len(words) and not _is_flag(words[end]):
        end += 1
    return words[place:end]


def _stray_word_remedy(words: list[str], place: int, kind_of: Callable[[str], str | None]) -> str:
    before = words[place - 1] if place else ""
    if _is_flag(before) and kind_of(before[2:]) == "switch":
        return f"{before} is a switch: write it alone, or {before}=true / {before}=false"
    return "put paths and texts with spaces in quotes; flags start with --"


def find_config_file(named: Path) -> Path | None:
    """The file named by --config_file, with or without .toml; None if there is none."""
    return next((candidate for candidate in (with_toml(named), named) if candidate.is_file()), None)


def with_toml(named: Path) -> Path:
    """The path with the extension .toml. A path without a name (`/`, `.`) stays as it is."""
    return named if named.suffix == ".toml" or not named.name else named.with_name(f"{named.name}.toml")


def read_config_file(path: Path, mistakes: Mistakes) -> Iterator[RawOption]:
    """Yield the options of a TOML file. Tables are flattened one level and their names ignored, as in sd-scripts.

    Raises UserError, with one mistake, for a file that cannot be read, is not TOML or is of another kind.
    """
    named = f"--config_file {path}"
    text = read_text(path, named)
    if isinstance(text, Mistake):
        raise UserError([text])
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        invalid = Mistake(
            f"{named} is not valid TOML: {error}",
            "fix that line; texts need quotes, Windows paths single quotes ('C:\\train')",
        )
        raise UserError([other_kind(named, text, OPTIONS) or invalid]) from None
    if (other := other_kind(named, tree, OPTIONS)) is not None:
        raise UserError([other])
    seen: dict[str, object] = {}
    for name, value in _flattened(tree):
        if name in seen and seen[name] != value:
            mistakes.add(f"{name} is set twice in {path.name}, to {seen[name]!r} and to {value!r}", "keep one of them")
            continue
        seen[name] = value
        yield RawOption(name, value, path.name)


def _flattened(tree: dict[str, object]) -> Iterator[tuple[str, object]]:
    """Names and values, with first-level tables flattened; a nested table keeps its dotted name, which no flag has."""
    for name, value in tree.items():
        if not isinstance(value, dict):
            yield name, value
            continue
        for inner, entry in value.items():
            yield (f"{name}.{inner}" if isinstance(entry, dict) else inner), entry
