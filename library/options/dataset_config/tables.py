"""Read one table of a dataset file by the table of keys: its values and mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.options.convert_values import BadValue, format_value
from library.options.dataset_config.keys import DREAMBOOTH, FINE_TUNING, KEYS, WRITE_INSTEAD, Key, Kind, Level
from library.options.dataset_config.locate import Address
from library.options.dataset_config.source import ConfigFile
from library.options.mistakes import Mistakes

LONGEST = 80  # maximum length of a value in messages, in characters

_NAMES: Mapping[Level, str] = {"general": "general", "dataset": "a dataset", "subset": "a subset"}
_KINDS: Mapping[Kind, str] = {
    DREAMBOOTH: "a dataset whose subsets have no metadata_file",
    FINE_TUNING: "a dataset whose subsets have a metadata_file",
}
_COMMAND_LINE_ONLY = "set it on the command line or in the --config_file"


@dataclass(frozen=True)
class Layer:
    """The valid values of one table; `at` is the table's address, `faulty` the keys with wrong values."""

    at: Address
    values: Mapping[str, Any]
    faulty: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Setting:
    """A value and its address."""

    value: Any
    at: Address


def nearest(name: str, layers: Sequence[Layer]) -> Setting | None:
    """The value from the first layer that has it: kohya's fall-back from subset to dataset to general."""
    for layer in layers:
        if name in layer.values:
            return Setting(layer.values[name], (*layer.at, name))
    return None


def describe_key(source: ConfigFile, at: Address, raw: object) -> str:
    """A key for messages: `num_repeats = "10" (data.toml, line 12)`."""
    text = "null" if raw is None else format_value(raw)
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
    return f"{at[-1]} = {text} ({source.origin(at)})"


def read_table(
    table: Mapping[str, object], at: Address, level: Level, kind: Kind | None, source: ConfigFile, mistakes: Mistakes
) -> Layer:
    """Read a table at its level. Without a `kind`, keys of all kinds are allowed. null means not set."""
    values: dict[str, Any] = {}
    faulty: set[str] = set()
    for name, raw in table.items():
        if level == "dataset" and name == "subsets":
            continue
        what = describe_key(source, (*at, name), raw)
        key = KEYS.get(name)
        if key is None:
            mistakes.add(f"{what} is not a key of {_NAMES[level]}", _remedy(name, level, kind))
        elif level not in key.levels:
            mistakes.add(f"{what} is not a key of {_NAMES[level]}", f"move it to {_home(key)}")
        elif raw is None:
            continue
        elif kind is not None and kind not in key.kinds:
            elsewhere = "; in general it applies to the other datasets" if "general" in key.levels else ""
            mistakes.add(f"{what} has no meaning in {_KINDS[kind]}", f"remove it{elsewhere}")
        else:
            try:
                values[name] = key.read(raw)
            except BadValue as bad:
                mistakes.add(f"{what} {bad.fault}", bad.remedy)
                faulty.add(name)
    return Layer(at, values, frozenset(faulty))


def _home(key: Key) -> str:
    return " or to ".join(_NAMES[level] for level in key.levels)


def _remedy(name: str, level: Level, kind: Kind | None) -> str:
    """What to write instead of an unknown key."""
    from difflib import get_close_matches  # imported late: only needed for an unknown key

    from library.options.future_flags import FUTURE_FLAGS  # imported late: these load all options
    from library.options.train_options import FLAGS

    if name in WRITE_INSTEAD:
        return f"write {WRITE_INSTEAD[name]}"
    if name in FUTURE_FLAGS:
        return "remove it; this version does not support it"
    if name in FLAGS:
        return _COMMAND_LINE_ONLY
    here = [key.name for key in KEYS.values() if level in key.levels and (kind is None or kind in key.kinds)]
    plain = name.replace("-", "_").lower()
    for candidates in (here, list(KEYS)):
        for found in get_close_matches(plain, candidates, n=1, cutoff=0.6):
            return f"did you mean {found}?" + ("" if found in here else f" It belongs to {_home(KEYS[found])}")
    return f"the keys of {_NAMES[level]} are {', '.join(here)}"
