"""A1111's `<lora:name:0.8>` in a prompt, and which adapters an image is drawn with. No torch.

    <lora:dog>            multiplier 1
    <lora:dog:0.8>        multiplier 0.8
    <lora:dog:0.5:0.8>    0.5 for the text encoders, 0.8 for the backbone; also <lora:dog:te=0.5:unet=0.8>

Format: A1111's extensions-builtin/Lora/extra_networks_lora.py. `<lyco:…>` is the same. As there, a tag applies to the
whole image, prompt and negative prompt alike.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

TAG = re.compile(r"(?<!\s)\s*<(?:lora|lyco):([^<>]+)>")


@dataclass(frozen=True)
class AdapterUse:
    """An adapter that an image is drawn with. `module`: the network module that merges it; None: this project's, by the
    kinds in the file."""

    path: Path
    multiplier: float = 1.0
    text_multiplier: float = 1.0  # of the text encoders
    module: str | None = None

    def __str__(self) -> str:
        both = self.multiplier == self.text_multiplier
        return f"{self.path.name} {self.multiplier:g}" + ("" if both else f" (text encoder {self.text_multiplier:g})")


@dataclass(frozen=True)
class LoraTag:
    """A tag as it is written, its name, and its multipliers."""

    text: str
    name: str
    multiplier: float
    text_multiplier: float


def split_tags(prompt: str) -> tuple[str, tuple[LoraTag, ...]]:
    """The prompt without its tags, and the tags. Raises ValueError for a tag that cannot be read: what is wrong."""
    tags = tuple(_read(found[0].strip(), found[1]) for found in TAG.finditer(prompt))
    return (TAG.sub("", prompt).strip(), tags) if tags else (prompt, ())


def _read(text: str, content: str) -> LoraTag:
    name, *values = (piece.strip() for piece in content.split(":"))
    numbers = [_number(text, value) for value in values if "=" not in value]
    named: dict[str, float] = {}
    for value in values:
        key, equals, number = value.partition("=")
        if equals and key.strip() not in ("te", "unet"):
            raise ValueError(f"{text}: {key.strip()} is not supported")
        if equals:
            named[key.strip()] = _number(text, number)
    if not name or len(numbers) > 2:
        raise ValueError(f"{text} cannot be read")
    both = numbers[0] if numbers else 1.0
    text_multiplier = named.get("te", both)
    return LoraTag(text, name, named.get("unet", numbers[1] if len(numbers) > 1 else text_multiplier), text_multiplier)


def _number(text: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f'{text}: "{value}" is not a number')
    return number
