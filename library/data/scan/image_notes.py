"""Notes about the images that are trained on: empty captions, transparency, colour profiles, frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from library.messages import counted, listed
from library.options.datasets import SubsetSpec

if TYPE_CHECKING:
    from library.data.image_files import ImageSource
    from library.data.scan.image_record import ImageRecord

_WHITE = (255, 255, 255)
_NAMED = 5  # files named in a note


def note_images(records: Sequence[ImageRecord], subsets: Sequence[SubsetSpec]) -> list[str]:
    """All notes. `subsets` are those of the scan."""
    return [*_captions(records, subsets), *_transparency(records, subsets), *_profiles(records), *_frames(records)]


def _captions(records: Sequence[ImageRecord], subsets: Sequence[SubsetSpec]) -> Iterator[str]:
    empty = list(dict.fromkeys(record.path for record in records if not record.caption and record.from_file))
    if empty:
        yield f"{counted(len(empty), 'image')} with an empty caption file, so an empty caption: {listed(empty, _NAMED)}"
    lacking: dict[str, set[ImageSource]] = {}
    for record in records:
        if not record.caption and not record.from_file:
            lacking.setdefault(_lacks(subsets[record.subset]), set()).add(record.path)
    for what, paths in lacking.items():
        yield f"{counted(len(paths), 'image')} without {what}, so an empty caption"


def _lacks(subset: SubsetSpec) -> str:
    """What would give an image of this subset a caption."""
    if subset.caption_source == "metadata":
        return f"a caption or tags in {subset.metadata_file}"
    if subset.caption_source == "file_name":
        return "words in its file name"
    return "class tokens" if subset.caption_source == "class_tokens" else "a caption file or class tokens"


def _transparency(records: Sequence[ImageRecord], subsets: Sequence[SubsetSpec]) -> Iterator[str]:
    filled: dict[tuple[int, int, int], set[ImageSource]] = {}
    masked: set[ImageSource] = set()
    for record in records:
        if record.transparent:
            subset = subsets[record.subset]
            by_alpha = subset.alpha_mask and record.mask is None
            (masked if by_alpha else filled.setdefault(subset.images.background, set())).add(record.path)
    for colour, paths in filled.items():
        name = "white" if colour == _WHITE else f"the colour {colour}"
        yield f"{counted(len(paths), 'image')} with transparency, filled with {name}"
    if masked:
        yield f"{counted(len(masked), 'image')} with transparency, used as mask"


def _profiles(records: Sequence[ImageRecord]) -> Iterator[str]:
    converted = {record.path for record in records if record.profile == "converted"}
    if converted:
        yield f"{counted(len(converted), 'image')} with a colour profile other than sRGB, converted to sRGB"
    unusable = list(dict.fromkeys(record.path for record in records if record.profile == "unusable"))
    if unusable:
        what = f"{counted(len(unusable), 'image')} with a colour profile that is damaged or for other pixels"
        yield f"{what}, taken as sRGB: {listed(unusable, _NAMED)}"


def _frames(records: Sequence[ImageRecord]) -> Iterator[str]:
    animated = list(dict.fromkeys(record.path for record in records if record.animated))
    if animated:
        used = "of which only the first is used"
        yield f"{counted(len(animated), 'image')} with several frames or pages, {used}: {listed(animated, _NAMED)}"
