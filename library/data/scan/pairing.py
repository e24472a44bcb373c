"""The one rule by which caption files and masks belong to images: their names.

A file belongs to an image if its name without its ending is the image's stem ("robot_1.txt"), or the image's whole file
name ("robot_1.png.txt", as gallery downloaders write it). Names that are equal come first, then those that differ only
in their Unicode form (macOS writes an accent separately), then those that differ in letter case. A file that belongs to
one image by an earlier rule is not given to another by a later one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence

from library.data.scan.listing import stem

MASK_LABEL = "-masklabel"
"""Ending of the stem of a mask that is beside its image, as in OneTrainer: img0-masklabel.png."""

Spelling = Callable[[str], str]


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC)."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def folded(name: str) -> str:
    """A name that is the same for all letter cases and Unicode forms."""
    return composed(composed(name).casefold())


def whole(name: str) -> str:
    """The name itself."""
    return name


def labelled(name: str) -> str:
    """The stem of the mask beside an image."""
    return stem(name) + MASK_LABEL


def is_mask_label(name: str) -> bool:
    """Whether an image file is a mask beside its image, by its name."""
    return stem(name).lower().endswith(MASK_LABEL)


def pair(
    images: Iterable[str], files: Sequence[tuple[str, str]], spellings: Sequence[Spelling] = (stem, whole)
) -> dict[str, str]:
    """Image -> its file. `files`: (name without ending, file), the preferred ones first. `spellings` of an image's name
    that the name of its file may have. Images whose names are equal by a rule share a file."""
    found: dict[str, str] = {}
    waiting, free = list(images), list(files)
    for same in (whole, composed, folded):
        for spelling in spellings:
            if not waiting or not free:
                return found
            by_name: dict[str, str] = {}
            for name, file in free:
                by_name.setdefault(same(name), file)
            new = {image: by_name[key] for image in waiting if (key := same(spelling(image))) in by_name}
            used = set(new.values())
            found |= new
            waiting = [image for image in waiting if image not in new]
            free = [(name, file) for name, file in free if file not in used]
    return found
