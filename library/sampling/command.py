"""From the words of a command line to an exit code: what every program that draws has in common. No torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from library.options.convert import UNSET, BadValue, convert, shown
from library.options.mistakes import Mistakes, UserError
from library.options.sources import COMMAND_LINE, read_command_line
from library.sampling.options import DrawingOptions, check, flags

Options = TypeVar("Options", bound=DrawingOptions)


@dataclass(frozen=True)
class Command(Generic[Options]):
    """One such program: what --help says of it, what it is told, and what it does with that."""

    title: str
    usage: str
    options: type[Options]
    draw: Callable[[Options], None]


def run(command: Command[Options], words: Sequence[str] | None = None) -> int:
    """Do what the command line asks for. Returns the exit code: 0 done, 2 mistakes of the user, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):  # prompts in any script must not end a run on a console of few letters
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    words = sys.argv[1:] if words is None else words
    if "--help" in words or "-h" in words:
        print(help_text(command))
        return 0
    try:
        command.draw(parse(command.options, words))
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the pictures drawn so far stand", file=sys.stderr)
        return 130
    return 0


def parse(kind: type[Options], words: Sequence[str]) -> Options:
    """The options of a command line. Raises UserError with every mistake of it."""
    known = flags(kind)
    mistakes = Mistakes()
    values: dict[str, Any] = {}
    for given in read_command_line(words, lambda name: known[name].kind if name in known else None, mistakes):
        if given.name not in known:
            mistakes.add(f"--{given.name} ({COMMAND_LINE}) is no flag of this program", "--help lists all flags")
            continue
        try:
            value, _ = convert(known[given.name], given.raw)
        except BadValue as bad:
            mistakes.add(f"--{given.name} = {shown(given.raw)} ({COMMAND_LINE}) {bad.fault}", bad.remedy)
            continue
        if value is not UNSET:
            values[given.name] = value
    options = kind(**values)
    check(options, mistakes)
    mistakes.raise_if_any()
    return options


def help_text(command: Command[Any]) -> str:
    """What --help prints."""
    lines = [command.title, "", f"usage: {command.usage} [more flags]", ""]
    for each in flags(command.options).values():
        choices = f". One of {', '.join(each.choices)}" if each.choices else ""
        default = choices + ("." if each.default in (None, False, "") else f". Default: {each.default}.")
        lines.append(
            f"  --{each.name}".ljust(30) + ("" if each.kind == "switch" else f"[{each.kind}] ") + each.help + default
        )
    return "\n".join(lines)
