"""Kinds of rules between flags and their conditions. The tables of rules are in general.py and its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from library.options.flag import Script

Condition = Callable[[Mapping[str, object]], bool]


@dataclass(frozen=True)
class Required:
    """A flag that must be set, unless one of `unless` is."""

    flag: str
    why: str
    remedy: str
    unless: tuple[str, ...] = ()
    script: Script | None = None  # the kind of training it applies to; None: all


@dataclass(frozen=True)
class Requires:
    """If `when` holds, `holds` must hold too. The message shows `flags`, the first one being the cause.

    The rule applies only if all flags of `set_by_user` are set by the user.
    """

    flags: tuple[str, ...]
    when: Condition
    holds: Condition
    why: str
    remedy: str
    set_by_user: tuple[str, ...] = ()


@dataclass(frozen=True)
class Excludes:
    """None of `flags` can be combined with `other`."""

    flags: tuple[str, ...]
    other: str
    why: str
    remedy: str


@dataclass(frozen=True)
class Implies:
    """If `when` holds, set `target` to `value`. A note says `why` if it changes the value; without `why` no note."""

    cause: str
    when: Condition
    target: str
    value: object
    why: str = ""


@dataclass(frozen=True)
class Overrides:
    """If the user set both, `winner` overrides `loser` with a note; `reset` holds the loser's new value, if any."""

    winner: str
    loser: str
    why: str
    reset: tuple[object, ...] = ()


@dataclass(frozen=True)
class NoEffect:
    """A flag that has no effect if `when` holds; a note says why. `scope` limits the effect, e.g. " on the VAE"."""

    flag: str
    when: Condition
    why: str
    scope: str = ""


def on(*names: str) -> Condition:
    """Condition: all of these flags are set and not off."""
    return lambda values: all(bool(values[name]) for name in names)


def off(*names: str) -> Condition:
    """Condition: none of these flags is set."""
    return lambda values: not any(bool(values[name]) for name in names)


def both(first: Condition, second: Condition) -> Condition:
    """Condition: the two hold."""
    return lambda values: first(values) and second(values)


def is_one_of(name: str, *choices: object) -> Condition:
    """Condition: the flag has one of these values (texts in any case)."""
    return lambda values: _lower(values[name]) in {_lower(value) for value in choices}


def differs(name: str, value: object) -> Condition:
    """Condition: the flag has another value than this one."""
    return lambda values: values[name] != value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value
