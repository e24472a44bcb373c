"""Count the tokens of captions, and keep the counts in the index: tokenizing 100,000 captions takes ten seconds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from library.data.scan.index import Index


def count_all(
    texts: Collection[str], count: Callable[[list[str]], Sequence[int]], counter: str, index: Path | None = None
) -> dict[str, int]:
    """Text -> its length as counted by `count`, using counts of earlier runs from the index in the folder `index`.

    `counter` identifies everything the count depends on: the vocabulary, whether prompt weights are parsed.
    """
    with Index(index) as stored:
        counter_hash = _hash(counter)
        known = stored.lengths(counter_hash)
        hashes = {text: _hash(text) for text in texts}
        new = [text for text, key in hashes.items() if key not in known]
        counts = {hashes[text]: length for text, length in zip(new, count(new) if new else (), strict=True)}
        stored.store_lengths(counter_hash, counts)
    known = {**known, **counts}
    return {text: known[key] for text, key in hashes.items()}


def _hash(text: str) -> int:
    """A 64-bit hash of a text: among a million texts, the chance of a collision is one in thirty million."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), signed=True)
