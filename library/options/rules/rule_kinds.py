"""The kinds of rules between flags, and the conditions that they are made of. The rules themselves are in rules.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from library.options.flag import Script

Condition = Callable[[Mapping[str, object]], bool]


@dataclass(frozen=True)
class Required:
    """A run cannot do without the flag, unless one of the others says the same."""

    flag: str
    why: str
    remedy: str
    unless: tuple[str, ...] = ()
    script: Script | None = None  # the kind of training that it holds for; None: all


@dataclass(frozen=True)
class Requires:
    """Where `when` holds, `holds` must hold too. `flags` are those the message shows, the first one being the cause;
    where one of `set_by_user` stands at its default, nothing is required."""

    flags: tuple[str, ...]
    when: Condition
    holds: Condition
    why: str
    remedy: str
    set_by_user: tuple[str, ...] = ()


@dataclass(frozen=True)
class Excludes:
    """None of the flags can be on together with the other."""

    flags: tuple[str, ...]
    other: str
    why: str
    remedy: str


@dataclass(frozen=True)
class Implies:
    """Where `when` holds and the target has another value, it gets this one. Without a `why` nothing is told."""

    cause: str
    when: Condition
    target: str
    value: object
    why: str = ""


@dataclass(frozen=True)
class Overrides:
    """Where both were given, the winner decides and the user is told. With `reset` the loser's value becomes that."""

    winner: str
    loser: str
    why: str
    reset: tuple[object, ...] = ()


@dataclass(frozen=True)
class NoEffect:
    """A flag that is on and has no effect where `when` holds; a note says why. `scope`: on what, if not on anything."""

    flag: str
    when: Condition
    why: str
    scope: str = ""


def on(*names: str) -> Condition:
    """All of these are set and not off."""
    return lambda values: all(bool(values[name]) for name in names)


def off(*names: str) -> Condition:
    """None of these is set."""
    return lambda values: not any(bool(values[name]) for name in names)


def is_one_of(name: str, *wanted: object) -> Condition:
    """The flag has one of these values (texts in any case)."""
    return lambda values: _lower(values[name]) in {_lower(value) for value in wanted}


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value
