"""What masks leave of the images to train on: a run in which nothing counts is a mistake, odd masks are noted."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from library.data.image_files import ImageSource
from library.data.scan.index import MaskValues
from library.data.scan.mask_values import MaskSource, mask_source, read_masks
from library.data.scan.scan import Scan
from library.messages import counted, listed
from library.options.groups.dataset import DatasetOptions
from library.options.groups.mask import MaskOptions
from library.options.mistakes import Mistakes

_NAMED = 5  # files named in a note
_LISTED = 20  # files named in a mistake


def check_masks(
    options: MaskOptions,
    scan: Scan,
    index: Path | None,
    mistakes: Mistakes,
    most_memory: float = DatasetOptions.max_image_memory,
) -> tuple[str, ...]:
    """Read the masks of the training images, add mistakes, and return the notes.

    `index`: folder in which the values of masks are kept; `most_memory`: GiB that a decoded mask may need.
    """
    # an image that is trained at several resolutions with one mask is one image here
    images = dict.fromkeys(
        (record.path, mask_source(record, scan.subsets[record.subset]), record.is_reg) for record in scan.records
    )
    masks = [source for _, source, _ in images if source is not None]
    found = read_masks(masks, index, progress=True, most_memory=most_memory)
    unreadable = {source.path: reason for source, reason in found.items() if isinstance(reason, str)}
    if unreadable:
        lines = listed((f"{path}: {reason}" for path, reason in unreadable.items()), _LISTED, "\n  ")
        mistakes.add(f"{counted(len(unreadable), 'mask')} cannot be used:\n  {lines}", "repair or remove them")
        return ()
    values = {source: each for source, each in found.items() if isinstance(each, MaskValues)}
    # regularisation images alone train no subject
    subjects = [source for _, source, is_reg in images if not is_reg] or [source for _, source, _ in images]
    if reason := _why_nothing_counts(options, subjects, values):
        remedies = ["correct the masks, in which white or opaque counts"]
        remedies.append("remove --mask_invert" if options.mask_invert else "set --mask_invert to train what they hide")
        if any(source is not None and source.transparency for source in subjects):
            remedies.append("remove --alpha_mask")
        mistakes.add(f"nothing would be trained: {reason}", "; or ".join(remedies))
        return ()
    return tuple(_notes(options, masks, values)) if masks else ()


def _largest_weight(options: MaskOptions, values: MaskValues) -> int:
    """Of any part of an image, 0 to 255, without --mask_floor."""
    return 255 - values.least if options.mask_invert else values.most


def _why_nothing_counts(
    options: MaskOptions, sources: Sequence[MaskSource | None], values: Mapping[MaskSource, MaskValues]
) -> str:
    """Why no image is trained, by the masks of all of them; "" if any part of one is."""
    masks = [source for source in sources if source is not None]
    if options.mask_floor > 0 or len(masks) < len(sources):
        return ""
    largest = max(_largest_weight(options, values[source]) for source in masks)
    if largest > 1:
        return ""
    is_one = len(masks) == 1
    those = "the only image" if is_one else f"all {len(masks)} images"
    if all(source.transparency for source in masks):
        state = "opaque, and --mask_invert is set" if options.mask_invert else "fully transparent"
        return f"{those} {'is' if is_one else 'are'} {state}, and transparency is the mask"
    state = "white, and --mask_invert is set" if options.mask_invert else "black"
    state += " (no value is above 1 of 255)" if largest and not options.mask_invert else ""
    return f"the mask of {those} is {state}" if is_one else f"the masks of {those} are {state}"


def _notes(options: MaskOptions, masks: Sequence[MaskSource], values: Mapping[MaskSource, MaskValues]) -> Iterator[str]:
    """`masks` has one item per image, `values` one per mask."""
    means = [values[mask].mean for mask in masks]
    shares = [1 - mean for mean in means] if options.mask_invert else means
    share = f"{_percent(sum(shares) / len(shares))} of the area counts"
    least, most = _percent(min(shares)), _percent(max(shares))
    if least != most:
        share += f" on average ({least} to {most})"
    if options.mask_floor:
        share += f", the rest at least {_percent(options.mask_floor)} (--mask_floor)"
    yield f"{counted(len(masks), 'image')} with a mask: {share}"
    ignored = [mask.path for mask, each in values.items() if _largest_weight(options, each) == 0]
    colour = "white, with --mask_invert," if options.mask_invert else "black"
    effect = "only --mask_floor counts" if options.mask_floor else "nothing of the image counts"
    yield from _named(ignored, f"{colour} everywhere, so that {effect}")
    dark = [mask.path for mask, each in values.items() if each.most == 1]
    yield from _named(dark, "with no value above 1 of 255, almost black; save white as 255")
    coloured = [mask.path for mask, each in values.items() if each.coloured]
    yield from _named(coloured, "in colour, used by luminance")


def _named(paths: Collection[ImageSource], what: str) -> Iterator[str]:
    """A note about some masks, unless there are none."""
    if paths:
        yield f"{counted(len(paths), 'mask')} {what}: {listed(paths, _NAMED)}"


def _percent(share: float) -> str:
    """A share as a text: 34%, 0.4%."""
    if share == 0 or share >= 0.0995:
        return f"{share:.0%}"
    return f"{share:.1%}" if share >= 0.0005 else "less than 0.1%"
