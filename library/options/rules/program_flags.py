"""Reject flags of another kind of training than the program's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from library.options.flag import Flag, Script
from library.options.mistakes import Mistake
from library.options.rules.apply_rules import DEFAULT, Settings

# Flag.script -> what this kind of training trains.
TRAINS: Mapping[Script, str] = MappingProxyType(
    {
        "train_db.py": "all weights of the model, without an adapter",
        "train_network.py": "an adapter, not the model itself",
    }
)


def drop_foreign_flags(settings: Settings, flags: Mapping[str, Flag], script: Script | None, program: str) -> Settings:
    """Reset flags of other kinds of training to their defaults, with a mistake for those that were on.

    Flags of one kind from one file are one mistake. `script` None keeps all flags; `program` is the name in messages.
    """
    if script is None:
        return settings
    foreign = [name for name, flag in flags.items() if flag.script not in (None, script)]
    on = [name for name in foreign if name in settings.set_by_user and _has_effect(flags[name], settings.values[name])]
    at_default = {name: flags[name].default for name in foreign}
    return replace(
        settings,
        values={**settings.values, **at_default},
        origins={**settings.origins, **dict.fromkeys(foreign, DEFAULT)},
        set_by_user=settings.set_by_user - set(foreign),
        mistakes=(*settings.mistakes, *_refusals(settings, flags, on, script, program)),
    )


def _has_effect(flag: Flag, value: object) -> bool:
    return value != flag.default and value not in flag.neutral_elsewhere


def _refusals(
    settings: Settings, flags: Mapping[str, Flag], on: list[str], script: Script, program: str
) -> Iterator[Mistake]:
    groups: dict[tuple[str, str], list[str]] = {}
    for name in on:
        groups.setdefault((str(flags[name].script), settings.origins[name]), []).append(name)
    for (owner, origin), names in groups.items():
        named = ", ".join(settings.describe(name).removesuffix(f" ({origin})") for name in names)
        belong, them = ("belongs", "it") if len(names) == 1 else ("belong", "them")
        yield Mistake(
            f"{named} ({origin}) {belong} to {owner}; {program} trains {TRAINS[script]}",
            f"run {owner}, or remove {them}",
        )
