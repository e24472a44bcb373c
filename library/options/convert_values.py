"""Convert raw values from the command line or a file to values of flags."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from library.options.flag import Flag
from library.options.key_value_pairs import BadPair, split_pairs

ON = ("true", "1", "yes", "on")
OFF = ("false", "0", "no", "off")

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::[A-Za-z][A-Za-z0-9+.-]+)*://")  # at least two letters: C:/ is a drive

# A token of the Hugging Face Hub, wherever it stands: under a misspelt name, or without one.
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
_COLOUR = re.compile(r"#?([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})")


class Unset:
    """Type of UNSET, the result for an empty text, an empty list, or 0 where 0 means off."""


UNSET = Unset()


class BadValue(ValueError):
    """A value that the flag cannot have. `fault` completes "--flag = value ..."; `remedy` says what to write."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(fault)
        self.fault = fault
        self.remedy = remedy


def convert(flag: Flag, raw: object) -> tuple[Any, str]:
    """Return the flag's value (UNSET if not set) and, if the raw value is read as another one, the reason.

    `raw` is text (a list of texts for list flags) from the command line, or any TOML value from a file.
    Raises BadValue.
    """
    if isinstance(raw, str) and raw.strip() == "":
        empty = next((read_as for read_as in flag.read_as if read_as.written == ""), None)
        return (UNSET, "") if empty is None else (empty.value, empty.why)
    if isinstance(raw, list) and all(isinstance(member, str) and not member.strip() for member in raw):
        return UNSET, ""
    if isinstance(raw, bool) and flag.kind == "text" and str(raw).lower() in flag.choices:
        return str(raw).lower(), ""  # a TOML file's true and false
    value = _pairs(raw) if flag.pairs else _READERS[flag.kind](raw)
    if flag.zero_is_off and value == 0:
        return UNSET, ""
    for read_as in flag.read_as:
        if value == read_as.written:
            return (UNSET if read_as.value is None else read_as.value), read_as.why
    _check_choice(flag, value)
    _check_range(flag, value)
    return value, ""


def format_value(raw: object) -> str:
    """A value as messages show it: texts in quotes, booleans as in TOML, tokens not at all."""
    if isinstance(raw, bool):
        return str(raw).lower()
    if isinstance(raw, str):
        return f'"{_HUB_TOKEN.sub("hf_(not shown)", raw)}"'
    if isinstance(raw, list):
        return "[" + ", ".join(format_value(member) for member in raw) + "]"
    return _HUB_TOKEN.sub("hf_(not shown)", str(raw))


def shown(flag: Flag, raw: object) -> str:
    """The value of a flag as messages show it; that of a secret is not shown."""
    return "(not shown)" if flag.secret else format_value(raw)


def _switch(raw: object) -> bool:
    text = str(raw).strip().lower()
    if isinstance(raw, (bool, int, str)) and text in ON:
        return True
    if isinstance(raw, (bool, int, str)) and text in OFF:
        return False
    raise BadValue("is neither true nor false", "write true or false (on the command line the flag alone means true)")


def _number(raw: object, remedy: str = "write a number such as 0.5 or 1e-6") -> int | float:
    """int if the text has no point or exponent, else float: lr_warmup_steps tells steps from shares by this."""
    if isinstance(raw, bool) or not isinstance(raw, (int, float, str)):
        raise BadValue("is not a number", remedy)
    value: int | float
    if isinstance(raw, str):
        try:
            value = int(raw.strip())
        except ValueError:
            try:
                value = float(raw.strip())
            except ValueError:
                raise BadValue("is not a number", remedy) from None
    else:
        value = raw
    if not math.isfinite(value):
        raise BadValue("is not a finite number", remedy)
    return value


def _integer(raw: object) -> int:
    remedy = "write a whole number"
    value = _number(raw, remedy)
    if value != int(value):
        raise BadValue("is not a whole number", remedy)
    return int(value)


def _float(raw: object) -> float:
    return float(_number(raw))


def _steps_or_share(raw: object) -> int | float:
    """An int is steps; a float up to 1, or "10%", a share of all steps. 100.0 is 100 steps, 1.0 the whole run."""
    remedy = "write a whole number of steps such as 100, or a share of all steps such as 0.1"
    if isinstance(raw, str) and raw.strip().endswith("%"):
        share = _number(raw.strip().removesuffix("%"), remedy) / 100
        if share > 1:
            raise BadValue("is more than 100%", remedy)
        return share
    value = _number(raw, remedy)
    if isinstance(value, int) or value == 0:
        return int(value)
    if value > 1:
        if value != int(value):
            raise BadValue("is neither a whole number of steps nor a share up to 1", "write for example 100 or 0.1")
        return int(value)
    return value


def _text(raw: object) -> str:
    if isinstance(raw, bool) or not isinstance(raw, (str, int, float)):
        raise BadValue("is not a text", "write a text in quotes")
    return _without_nul(raw) if isinstance(raw, str) else str(raw)


def _path(raw: object) -> Path:
    if not isinstance(raw, str):
        raise BadValue("is not a path", "write the path in quotes")
    return Path(os.path.expanduser(_without_nul(raw)))  # Path.expanduser raises for an unknown user


def _path_or_url(raw: object) -> Path | str:
    """A URL remains text: a Path would drop one of its slashes."""
    return _without_nul(raw) if isinstance(raw, str) and is_remote(raw) else _path(raw)


def is_remote(text: str) -> bool:
    """Whether the text is a URL: s3://bucket/data, simplecache::s3://bucket, file:///data; not C:/data."""
    return _URL.match(text) is not None


def read_colour(text: str) -> tuple[int, int, int] | None:
    """The colour (red, green, blue) of "#rrggbb"; None for another text."""
    match = _COLOUR.fullmatch(text.strip())
    if match is None:
        return None
    red, green, blue = (int(part, 16) for part in match.groups())
    return red, green, blue


def _without_nul(text: str) -> str:
    """Reject a NUL character, which no file system allows in a name."""
    if "\0" in text:
        raise BadValue("contains a NUL character", "remove it")
    return text


def _list(raw: object) -> tuple[str, ...]:
    if isinstance(raw, str):
        return tuple(raw.split())
    if isinstance(raw, list) and all(isinstance(member, (str, int, float)) for member in raw):
        return tuple(str(member) for member in raw)
    raise BadValue("is not a list of texts", 'write a list such as ["key=value", "key2=value2"]')


def _pairs(raw: object) -> tuple[str, ...]:
    """A list of key=value, or a text that holds one or several."""
    try:
        return split_pairs([raw] if isinstance(raw, str) else _list(raw))
    except BadPair as bad:
        raise BadValue(bad.fault, bad.remedy) from bad


def _numbers(raw: object) -> tuple[float, ...]:
    """One number, or several as a list or separated by spaces or commas."""
    remedy = "write a number such as 1e-4, or a list of numbers"
    members = raw if isinstance(raw, list) else [raw]
    parts = [part for raw in members for part in (raw.replace(",", " ").split() if isinstance(raw, str) else [raw])]
    return tuple(float(_number(part, remedy)) for part in parts)


def _paths(raw: object) -> tuple[Path, ...]:
    """One path or a list of paths; a text is one path, as paths may contain spaces."""
    return tuple(_path(part) for part in (raw if isinstance(raw, list) else [raw]))


def _resolution(raw: object) -> tuple[int, int]:
    remedy = "write 512 for a square, or width,height such as 512,768"
    parts: list[object] = list(raw) if isinstance(raw, list) else []
    if isinstance(raw, str):
        parts = list(raw.split(","))
    elif not isinstance(raw, list):
        parts = [raw]
    try:
        sides = [_integer(part) for part in parts]
    except BadValue:
        raise BadValue("is not a resolution", remedy) from None
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise BadValue("is not a resolution", remedy)
    return sides[0], sides[-1]


def _range(raw: object) -> tuple[float, float]:
    remedy = "write two numbers, the smaller one first, such as 2.0,4.0"
    parts = list(raw) if isinstance(raw, list) else str(raw).split(",")
    try:
        ends = [_float(part) for part in parts]
    except BadValue:
        raise BadValue("is not a range", remedy) from None
    if len(ends) != 2 or not 0 < ends[0] <= ends[1]:
        raise BadValue("is not a range", remedy)
    return ends[0], ends[1]


_READERS: Mapping[str, Callable[[object], Any]] = MappingProxyType(
    {
        "switch": _switch,
        "integer": _integer,
        "number": _float,
        "steps or share": _steps_or_share,
        "text": _text,
        "path": _path,
        "path or URL": _path_or_url,
        "list": _list,
        "numbers": _numbers,
        "paths": _paths,
        "width,height": _resolution,
        "from,to": _range,
    }
)


def _check_choice(flag: Flag, value: object) -> None:
    if flag.choices and value not in flag.choices:
        names = ", ".join(str(choice) for choice in flag.choices)
        raise BadValue("is not one of its values", f"choose one of {names}")


def _check_range(flag: Flag, value: object) -> None:
    if isinstance(value, tuple) and flag.kind == "numbers":
        for member in value:
            _check_range(replace(flag, kind="number"), member)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if flag.at_least is not None and value < flag.at_least:
        remedy = flag.too_low or f"write a number of at least {flag.at_least:g}"
        raise BadValue(f"is below {flag.at_least:g}", remedy)
    if flag.at_most is not None and value > flag.at_most:
        raise BadValue(f"is above {flag.at_most:g}", f"write a number of at most {flag.at_most:g}")
    if flag.above is not None and value <= flag.above:
        raise BadValue(f"is not above {flag.above:g}", f"write a number above {flag.above:g}")
    if flag.below is not None and value >= flag.below:
        raise BadValue(f"is not below {flag.below:g}", f"write a number below {flag.below:g}")
