"""Run a small tool from its command line: parsing, --help, user errors and exit codes. No torch."""

from __future__ import annotations

import errno
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, TextIO, TypeVar

from library.options.convert_values import UNSET, BadValue, convert, format_value
from library.options.flag import Flag, flags_of
from library.options.mistakes import Mistakes, UserError
from library.options.report import report_mistakes
from library.options.sources import COMMAND_LINE, LIST_KINDS, read_command_line

Options = TypeVar("Options")
SUGGESTION = 0.6  # similarity from which a flag is suggested for an unknown one


def _no_check(options: Any, mistakes: Mistakes) -> None:
    """Check nothing."""


@dataclass(frozen=True)
class Tool(Generic[Options]):
    """A small program: title and usage for --help, the dataclass of its flags, and the function that does the work.

    `required` are flags that must be set, each with its remedy; `check` adds mistakes about combinations of options;
    `interrupted` is the message after Ctrl-C; `work` raises UserError for mistakes of the user. `positional`: flags
    whose values may be given without the flag, in this order; `aliases`: other spellings of flags; `remedies`: what to
    do instead of a flag that the program of this name in sd-scripts has, and this one has not.
    """

    title: str
    usage: str
    options: type[Options]
    work: Callable[[Options], None]
    required: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[Options, Mistakes], None] = _no_check
    interrupted: str = "interrupted: no incomplete file was left"
    positional: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    remedies: Mapping[str, str] = field(default_factory=dict)


def run_tool(tool: Tool[Options], words: Sequence[str] | None = None) -> int:
    """Run a tool and return its exit code: 0 done, 1 nobody reads its output, 2 user error, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):  # file names may be in any script, also where the output is redirected
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    words = sys.argv[1:] if words is None else words
    try:
        with quiet_broken_pipe():
            if "--help" in words or "-h" in words:
                print(help_text(tool))
            else:
                tool.work(parse_tool(tool, words))
    except UserError as error:
        return report_mistakes(error)
    except KeyboardInterrupt:
        print(f"\n{tool.interrupted}", file=sys.stderr)
        return 130
    return 0


@contextmanager
def quiet_broken_pipe() -> Iterator[None]:
    """End the program with exit code 1 and without a traceback if the reader of its output is gone: `... | head -1`, a
    closed terminal."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        # Windows has no errno of its own for it: then the output cannot be flushed either
        if not isinstance(error, BrokenPipeError) and (error.errno != errno.EINVAL or not _is_broken(sys.stdout)):
            raise
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # the interpreter's last flush must not fail too
        raise SystemExit(1) from None


def _is_broken(stream: TextIO) -> bool:
    try:
        stream.flush()
    except OSError:
        return True
    return False


def tool_flags(options: type[Any]) -> Mapping[str, Flag]:
    """The flags of a tool by name, in field order."""
    return MappingProxyType({flag.name: flag for flag in flags_of("tool", options)})


def parse_tool(tool: Tool[Options], words: Sequence[str]) -> Options:
    """Parse a tool's command line. Raises UserError with all its mistakes."""
    known = tool_flags(tool.options)
    words = list(_add_flags(tool, words, known))
    mistakes = Mistakes()
    values: dict[str, Any] = {}
    for option in read_command_line(words, lambda name: known[name].kind if name in known else None, mistakes):
        if option.name not in known:
            remedy = tool.remedies.get(option.name) or _closest_name(option.name, known)
            mistakes.add(f"--{option.name} ({COMMAND_LINE}) is not a flag of this program", remedy)
            continue
        try:
            value, _ = convert(known[option.name], option.raw)
        except BadValue as bad:
            mistakes.add(f"--{option.name} = {format_value(option.raw)} ({COMMAND_LINE}) {bad.fault}", bad.remedy)
            continue
        if value is not UNSET:
            values[option.name] = value
    reported = " ".join(mistake.what for mistake in mistakes)
    for name, remedy in tool.required.items():
        if name not in values and f"--{name} " not in reported:
            mistakes.add(f"no --{name}", remedy)
    options = tool.options(**values)
    tool.check(options, mistakes)
    mistakes.raise_if_any()
    return options


def _add_flags(tool: Tool[Any], words: Sequence[str], known: Mapping[str, Flag]) -> Iterator[str]:
    """The words with a flag before each positional value, and with aliases spelled out."""
    unnamed = iter(tool.positional)
    values = 0.0  # how many of the following words belong to the last flag
    for word in (_without_alias(word, tool.aliases) for word in words):
        if word.startswith("--"):
            name, equals, _ = word[2:].partition("=")
            kind = known[name].kind if name in known else None
            values = 0 if equals or kind == "switch" else math.inf if kind in (None, *LIST_KINDS) else 1
        elif values:
            values -= 1
        elif (name := next(unnamed, "")) != "":
            yield f"--{name}"
        yield word


def _without_alias(word: str, aliases: Mapping[str, str]) -> str:
    """A word with its flag spelled out: --flag or --flag=value."""
    name, equals, value = word.partition("=")
    return f"{aliases.get(name, name)}{equals}{value}"


def _closest_name(name: str, known: Mapping[str, Flag]) -> str:
    from difflib import get_close_matches  # imported late: only needed for an unknown name

    found = get_close_matches(name.replace("-", "_"), known, n=1, cutoff=SUGGESTION)
    return f"did you mean --{found[0]}?" if found else "--help lists all flags"


def help_text(tool: Tool[Any]) -> str:
    """The text of --help."""
    lines = [tool.title, "", f"usage: {tool.usage}", ""]
    for flag in tool_flags(tool.options).values():
        choices = f". One of {', '.join(str(choice) for choice in flag.choices)}" if flag.choices else ""
        plain = flag.default in (None, False, "", ())
        default = choices + ("." if plain else f". Default: {flag.default}.")
        kind = "" if flag.kind == "switch" else f"[{flag.kind}] "
        label = flag.name if flag.name in tool.positional else f"--{flag.name}"
        lines.append(f"  {label}".ljust(30) + kind + flag.help + default)
    return "\n".join(lines)
