"""How many tokens each caption has, counted once and remembered: a tokenizer takes ten seconds for 100,000."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from library.data.scan.index import Index


def count_all(
    texts: Collection[str], count: Callable[[list[str]], Sequence[int]], counter: str, index: Path | None = None
) -> dict[str, int]:
    """Text -> what `count` gives for it in a list of texts, from what earlier runs counted where there is an `index`
    (the folder of the scan's).

    `counter` names all that the count depends on: the vocabulary, whether weights are read.
    """
    with Index(index) as remembered:
        name = _number(counter)
        known = remembered.lengths(name)
        numbers = {text: _number(text) for text in texts}
        new = [text for text, number in numbers.items() if number not in known]
        found = {numbers[text]: length for text, length in zip(new, count(new) if new else (), strict=True)}
        remembered.keep_lengths(name, found)
    known = {**known, **found}
    return {text: known[number] for text, number in numbers.items()}


def _number(text: str) -> int:
    """64 bits that stand for a text: among a million, two share them with a chance of one in thirty million."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), signed=True)
