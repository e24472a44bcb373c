"""One dataclass field is one flag: argument of the command line, TOML key, row of the docs, metadata key."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# The annotation of a field says what the flag takes; the words are those shown to users.
KINDS = {
    "bool": "switch",
    "int": "integer",
    "float": "number",
    "int | float": "steps or share",
    "str": "text",
    "Path": "path",
    "Path | str": "path or URL",
    "tuple[str, ...]": "list",
    "tuple[float, ...]": "numbers",
    "tuple[Path, ...]": "paths",
    "tuple[int, int]": "width,height",
    "tuple[float, float]": "from,to",
}


@dataclass(frozen=True)
class ReadAs:
    """A value that front-ends write and what it stands for; a `why` is told, none means that both say the same."""

    given: object
    taken: object
    why: str = ""


@dataclass(frozen=True)
class Flag:
    """Everything known about one flag. `group` is the attribute of TrainOptions with the field, `kind` is of KINDS."""

    name: str
    group: str
    kind: str
    default: Any
    help: str
    choices: tuple[Any, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    zero_is_off: bool = False  # 0 says "not set": the default then stands
    pairs: bool = False  # a list whose members are key=value
    aliases: tuple[str, ...] = ()
    read_as: tuple[ReadAs, ...] = ()
    needs: str | None = None  # the capability a model family must have for the flag to have a meaning
    metadata: str | None = None  # key under which a saved file tells the value
    secret: bool = False  # its value is never shown, written or logged
    script: str | None = None  # the only kind of training that has it, by its first program; None: all have it
    neutral: tuple[Any, ...] = ()  # further values that ask a family without the capability for nothing


def flag(
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    zero_is_off: bool = False,
    pairs: bool = False,
    aliases: tuple[str, ...] = (),
    read_as: tuple[ReadAs, ...] = (),
    needs: str | None = None,
    metadata: str | None = None,
    secret: bool = False,
    script: str | None = None,
    neutral: tuple[Any, ...] = (),
) -> Any:
    """A dataclass field that is a flag. Returns Any, like dataclasses.field, so that fields keep their annotation."""
    facts = {
        "help": help,
        "choices": choices,
        "at_least": at_least,
        "at_most": at_most,
        "above": above,
        "below": below,
        "zero_is_off": zero_is_off,
        "pairs": pairs,
        "aliases": aliases,
        "read_as": read_as,
        "needs": needs,
        "metadata": metadata,
        "secret": secret,
        "script": script,
        "neutral": neutral,
    }
    return dataclasses.field(default=default, metadata=facts)


def flags_of(group: str, options: type[Any]) -> Iterator[Flag]:
    """The flags of one group in the order of its fields. `options` is a dataclass whose fields were made by flag()."""
    for field in dataclasses.fields(options):
        annotation = str(field.type).removesuffix(" | None")
        yield Flag(name=field.name, group=group, kind=KINDS[annotation], default=field.default, **field.metadata)
