"""From the words of a command line to an exit code: what small tools have in common. No torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from library.options.convert_values import UNSET, BadValue, convert, shown
from library.options.flag import Flag, flags_of
from library.options.mistakes import Mistakes, UserError
from library.options.sources import COMMAND_LINE, LIST_KINDS, read_command_line

Options = TypeVar("Options")
SUGGESTION = 0.6  # a name as like a flag as this is proposed


def _nothing_more(options: Any, mistakes: Mistakes) -> None:
    """No check beyond those of the flags."""


@dataclass(frozen=True)
class Tool(Generic[Options]):
    """A small program: what --help says of it, the dataclass of its flags, and what it does with them.

    `required` are the flags that must be given, each with the way out; `check` adds what is wrong with options as a
    whole; `interrupted` is what to say after Ctrl-C; `work` raises UserError for what only the user can mend.
    `positional`: flags whose values may be given without the flag, in this order; `aliases`: other spellings of flags.
    """

    title: str
    usage: str
    options: type[Options]
    work: Callable[[Options], None]
    required: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[Options, Mistakes], None] = _nothing_more
    interrupted: str = "interrupted: nothing half-written was left"
    positional: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)


def run_tool(tool: Tool[Options], words: Sequence[str] | None = None) -> int:
    """Do what the command line asks for. Returns the exit code: 0 done, 2 mistakes of the user, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):  # file names may be in any script, also where the output is redirected
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    words = sys.argv[1:] if words is None else words
    if "--help" in words or "-h" in words:
        print(help_text(tool))
        return 0
    try:
        tool.work(parse_tool(tool, words))
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{tool.interrupted}", file=sys.stderr)
        return 130
    return 0


def tool_flags(options: type[Any]) -> Mapping[str, Flag]:
    """The flags of a tool by name, in the order of --help."""
    return MappingProxyType({each.name: each for each in flags_of("tool", options)})


def parse_tool(tool: Tool[Options], words: Sequence[str]) -> Options:
    """The options of a command line. Raises UserError with every mistake of it."""
    known = tool_flags(tool.options)
    words = list(_add_flags(tool, words, known))
    mistakes = Mistakes()
    values: dict[str, Any] = {}
    for given in read_command_line(words, lambda name: known[name].kind if name in known else None, mistakes):
        if given.name not in known:
            mistakes.add(f"--{given.name} ({COMMAND_LINE}) is no flag of this program", _nearest(given.name, known))
            continue
        try:
            value, _ = convert(known[given.name], given.raw)
        except BadValue as bad:
            mistakes.add(f"--{given.name} = {shown(given.raw)} ({COMMAND_LINE}) {bad.fault}", bad.remedy)
            continue
        if value is not UNSET:
            values[given.name] = value
    told = " ".join(mistake.what for mistake in mistakes)
    for name, remedy in tool.required.items():
        if name not in values and f"--{name} " not in told:
            mistakes.add(f"no --{name}", remedy)
    options = tool.options(**values)
    tool.check(options, mistakes)
    mistakes.raise_if_any()
    return options


def _add_flags(tool: Tool[Any], words: Sequence[str], known: Mapping[str, Flag]) -> Iterator[str]:
    """The words with a flag before each positional value, and with aliases spelled out."""
    unnamed = iter(tool.positional)
    values = 0.0  # how many of the following words belong to the last flag
    for word in (tool.aliases.get(word, word) for word in words):
        if word.startswith("--"):
            name, equals, _ = word[2:].partition("=")
            kind = known[name].kind if name in known else None
            values = 0 if equals or kind == "switch" else math.inf if kind in (None, *LIST_KINDS) else 1
        elif values:
            values -= 1
        elif (name := next(unnamed, "")) != "":
            yield f"--{name}"
        yield word


def _nearest(name: str, known: Mapping[str, Flag]) -> str:
    from difflib import get_close_matches  # only where a name is unknown: --help does without it

    found = get_close_matches(name.replace("-", "_"), known, n=1, cutoff=SUGGESTION)
    return f"did you mean --{found[0]}?" if found else "--help lists all flags"


def help_text(tool: Tool[Any]) -> str:
    """What --help prints."""
    lines = [tool.title, "", f"usage: {tool.usage}", ""]
    for each in tool_flags(tool.options).values():
        choices = f". One of {', '.join(str(choice) for choice in each.choices)}" if each.choices else ""
        plain = each.default in (None, False, "", ())
        default = choices + ("." if plain else f". Default: {each.default}.")
        kind = "" if each.kind == "switch" else f"[{each.kind}] "
        label = each.name if each.name in tool.positional else f"--{each.name}"
        lines.append(f"  {label}".ljust(30) + kind + each.help + default)
    return "\n".join(lines)
