"""Read raw options, not yet converted, from the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from library.options.convert_values import format_value
from library.options.mistakes import Mistakes

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
            mistakes.add(
                f"{format_value(word)} ({COMMAND_LINE}) belongs to no flag",
                _stray_word_remedy(words, place - 1, kind_of),
            )
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
