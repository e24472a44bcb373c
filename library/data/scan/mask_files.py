"""Which mask belongs to which image, by their names alone, and which fits it by its size."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from library.options.datasets import Size


def find_masks(names: Iterable[str], mask_names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The mask of each image that has one, and the masks left over, sorted.

    Names are paths inside the folder of the images and that of the masks, "/" between their parts. A mask has its
    image's name with any ending; of several the one with the same ending counts, in any letter case, else the first
    by name. Two images with one name but for the ending share a mask. Whoever lists the masks leaves out files of
    endings that are no images.
    """
    by_stem: dict[str, list[tuple[str, str]]] = {}  # stem -> (ending, name)
    for mask in sorted(mask_names):
        stem, ending = _split(mask)
        by_stem.setdefault(stem, []).append((ending, mask))
    found: dict[str, str] = {}
    for name in names:
        stem, ending = _split(name)
        if candidates := by_stem.get(stem):
            found[name] = next((mask for other, mask in candidates if other == ending), candidates[0][1])
    used = set(found.values())
    return found, tuple(sorted(mask for masks in by_stem.values() for _, mask in masks if mask not in used))


def same_proportion(one: Size, other: Size) -> bool:
    """Whether one is the other scaled, its shorter side rounded up or down."""
    small, large = sorted((one, other))
    return abs(small[1] - small[0] * large[1] / large[0]) < 1 or abs(small[0] - small[1] * large[0] / large[1]) < 1


def _split(name: str) -> tuple[str, str]:
    """Stem with its folders, and the ending in lower case. macOS may write one and the same name in two ways."""
    stem, _, ending = name.rpartition(".")
    return stem if stem.isascii() else unicodedata.normalize("NFC", stem), ending.lower()
