"""Which mask belongs to which picture, by their names alone."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath


def find_masks(names: Iterable[str], mask_names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The mask of each picture that has one, and the masks left over, sorted.

    Names are paths inside the folder of the pictures and that of the masks, "/" between their parts. A mask has its
    picture's name with any ending; of several the one with the same ending counts, in any letter case, else the first
    by name. Two pictures with one name but for the ending share a mask. Whoever lists the masks leaves out files of
    endings that are no pictures.
    """
    by_stem: dict[str, list[str]] = {}
    for mask in sorted(mask_names):
        by_stem.setdefault(_stem(mask), []).append(mask)
    found: dict[str, str] = {}
    for name in names:
        candidates = by_stem.get(_stem(name), [])
        same = [mask for mask in candidates if _ending(mask) == _ending(name)]
        if candidates:
            found[name] = (same or candidates)[0]
    used = set(found.values())
    return found, tuple(mask for masks in by_stem.values() for mask in masks if mask not in used)


def _stem(name: str) -> str:
    """macOS may write one and the same name in two ways."""
    return unicodedata.normalize("NFC", str(PurePosixPath(name).with_suffix("")))


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower()
