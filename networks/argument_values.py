"""Read the values of --network_args from strings, as users and front-ends write them. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

_Value = TypeVar("_Value")
_YES, _NO = {"true", "1", "yes", "on"}, {"false", "0", "no", "off", "", "none"}


def switch(text: str) -> bool:
    """True or False in any case; also 1/0, yes/no, on/off. An empty text is False. ValueError otherwise."""
    word = text.strip().lower()
    if word in _YES | _NO:
        return word in _YES
    raise ValueError("is not True or False")


def number(*, least: float = -math.inf, below: float = math.inf) -> Callable[[str], float]:
    """A reader of finite numbers, least <= number < below."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError("is not a number") from None
        if not math.isfinite(value):
            raise ValueError("is not finite")
        if value < least:
            raise ValueError(f"is less than {least:g}")
        if value >= below:
            raise ValueError(f"is not less than {below:g}")
        return value

    return read


def whole(*, least: int) -> Callable[[str], int]:
    """A reader of whole numbers, `least` or more; accepts "8.0", as front-ends write."""

    def read(text: str) -> int:
        value = number(least=least)(text)
        if value != int(value):
            raise ValueError("is not a whole number")
        return int(value)

    return read


def choice(*words: str) -> Callable[[str], str]:
    """A reader of one of `words`, in any case."""

    def read(text: str) -> str:
        word = text.strip().lower()
        if word not in words:
            raise ValueError(f"is not one of {', '.join(words)}")
        return word

    return read


def whole_numbers(text: str) -> tuple[int, ...]:
    """Whole numbers, 0 or more, separated by commas."""
    return tuple(_read_items(text, whole(least=0)))


def numbers(text: str) -> tuple[float, ...]:
    """Numbers, 0 or more, separated by commas."""
    return tuple(_read_items(text, number(least=0)))


def _read_items(text: str, read: Callable[[str], _Value]) -> list[_Value]:
    try:
        return [read(item) for item in text.split(",")]
    except ValueError as error:
        raise ValueError(f"has an item that {error}") from None


def curve(text: str) -> Callable[[int], tuple[float, ...]]:
    """Factors by block as kohya writes them: `factors` with a comma, or the name of a curve.

    Names: cosine, sine, linear, reverse_linear, zeros, with an optional "+base". Returns a function of the number of
    blocks.
    """
    name, _, base = text.strip().partition("+")
    if "," in text:
        return factors(text)
    if name not in _CURVES:
        raise ValueError(f"is not a comma-separated list or one of {', '.join(_CURVES)}")
    shape, raised = _CURVES[name], number()(base) if base else 0.0
    return lambda count: tuple(shape(i / (count - 1) if count > 1 else 1.0) + raised for i in range(count))


def factors(text: str) -> Callable[[int], tuple[float, ...]]:
    """Factors by block: an empty item is 0, a short list is filled up with 1, a long one is cut."""
    items = _read_items(text, lambda item: number(least=0)(item) if item.strip() else 0.0)
    return lambda count: (*items[:count], *[1.0] * (count - len(items)))


_CURVES: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: math.sin(math.pi * (1 - x) / 2),
    "sine": lambda x: math.sin(math.pi * x / 2),
    "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x,
    "zeros": lambda x: 0.0,
}
