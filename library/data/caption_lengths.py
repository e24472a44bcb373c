"""How many tokens each caption has, counted once and remembered: a tokenizer takes ten seconds for 100,000."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path

from library.data.index import Index


def count_all(
    texts: Collection[str], count: Callable[[str], int], counter: str, index: Path | None = None
) -> dict[str, int]:
    """Text -> `count(text)`, from what earlier runs counted where there is an `index` (the folder of the scan's).

    `counter` names all that the count depends on: the vocabulary, whether weights are read.
    """
    with Index(index) as remembered:
        name = _number(counter)
        known = remembered.lengths(name)
        lengths: dict[str, int] = {}
        found: dict[int, int] = {}
        for text in texts:
            number = _number(text)
            length = known.get(number)
            if length is None:
                length = found[number] = count(text)
            lengths[text] = length
        remembered.keep_lengths(name, found)
    return lengths


def _number(text: str) -> int:
    """64 bits that stand for a text: among a million, two share them with a chance of one in thirty million."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), signed=True)
