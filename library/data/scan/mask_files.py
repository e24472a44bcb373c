"""Match masks to images by name, and compare their aspect ratios."""

from __future__ import annotations

from collections.abc import Iterable

from library.data.scan.listing import stem
from library.data.scan.pairing import composed, labelled, pair, whole
from library.options.datasets import Size


def find_masks(names: Iterable[str], mask_names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Map images to their masks; also return the masks without an image, sorted.

    Names are paths relative to the image folder and the mask folder, with "/". A mask has the name of its image with
    any extension; of several, the one with the same extension is used (ignoring case), else the first by name. Two
    images whose names differ only in the extension share a mask. Images without such a mask get theirs by the rule of
    `pairing`, or the one named like OneTrainer's, img0-masklabel.png. `mask_names` must be image files only.
    """
    masks = sorted(mask_names)
    by_stem: dict[str, list[tuple[str, str]]] = {}  # stem -> (extension, name)
    for mask in masks:
        key, extension = _split(mask)
        by_stem.setdefault(key, []).append((extension, mask))
    found: dict[str, str] = {}
    waiting: list[str] = []
    for name in names:
        key, extension = _split(name)
        if candidates := by_stem.get(key):
            found[name] = next((mask for other, mask in candidates if other == extension), candidates[0][1])
        else:
            waiting.append(name)
    used = set(found.values())
    found |= pair(waiting, [(stem(mask), mask) for mask in masks if mask not in used], (stem, whole, labelled))
    used = set(found.values())
    return found, tuple(mask for mask in masks if mask not in used)


def same_aspect_ratio(first: Size, second: Size) -> bool:
    """Whether two sizes have the same aspect ratio, up to rounding of the shorter side."""
    small, large = sorted((first, second))
    return abs(small[1] - small[0] * large[1] / large[0]) < 1 or abs(small[0] - small[1] * large[0] / large[1]) < 1


def _split(name: str) -> tuple[str, str]:
    """Stem with its folders, and lower-case extension. Normalised, because macOS has two spellings of accents."""
    before, _, extension = name.rpartition(".")
    return composed(before), extension.lower()
