"""Find images with possible problems, and select the images to show when there are too many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from library.data.contact_sheet.records import Page, SheetImage, Size
from library.data.contact_sheet.thumbnails import Thumbnail

MUCH_CUT_AWAY = 0.25
"""Images that lose more than this share of their area to the crop are reported."""


@dataclass(frozen=True)
class Kind:
    """A kind of problem. `one` and `many` continue the sentences "1 image ..." and "7 images ..."."""

    name: str
    label: str  # in the filter and on the image's card
    one: str
    many: str
    severe: bool = False


KINDS = (
    Kind("damaged", "cannot be opened", "cannot be opened", "cannot be opened", severe=True),
    Kind("mask-damaged", "mask cannot be used",
         "has a mask that cannot be used", "have masks that cannot be used", severe=True),
    Kind("cut", "caption truncated", "has a caption of more than {limit} tokens: it is truncated",
         "have captions of more than {limit} tokens: they are truncated"),
    Kind("empty", "no caption", "has an empty caption in every epoch shown",
         "have an empty caption in every epoch shown"),
    Kind("unmasked", "no mask", "has no mask, although other images of its subset do",
         "have no mask, although other images of their subset do"),
    Kind("black", "mask is black", "has a completely black mask", "have completely black masks"),
    Kind("enlarged", "upscaled", "is smaller than its bucket and is upscaled",
         "are smaller than their buckets and are upscaled"),
    Kind("cropped", "heavily cropped", "loses more than a quarter of its area to the crop",
         "lose more than a quarter of their area to the crop"),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """The images, by index, that have a kind of problem."""

    kind: Kind
    images: tuple[int, ...]


def classify(page: Page, opened: Mapping[int, Thumbnail]) -> tuple[tuple[str, ...], ...]:
    """Names of each image's kinds of problems. Files are only checked for the images in `opened`."""
    masked = {image.subset for image in page.images if image.mask is not None}
    return tuple(
        (
            *_file_problems(opened.get(index)),
            *_record_problems(image, page.token_limit, masks_expected=image.subset in masked),
        )
        for index, image in enumerate(page.images)
    )


def _file_problems(thumbnail: Thumbnail | None) -> list[str]:
    if thumbnail is None:
        return []
    kinds = {
        "damaged": bool(thumbnail.error),
        "mask-damaged": bool(thumbnail.mask_error),
        "black": thumbnail.learnt == 0,
    }
    return [name for name, applies in kinds.items() if applies]


def _record_problems(image: SheetImage, token_limit: int, *, masks_expected: bool) -> list[str]:
    kinds = {
        "cut": any(caption.tokens > token_limit for caption in image.captions),
        "empty": not any(caption.text.strip() for caption in image.captions),
        "unmasked": masks_expected and image.mask is None,
        "enlarged": image.enlarged > 1,
        "cropped": image.cut_away > MUCH_CUT_AWAY,
    }
    return [name for name, applies in kinds.items() if applies]


def findings(kinds: Sequence[Sequence[str]]) -> list[Finding]:
    """Group images by kind of problem, worst first. `kinds`: the names for each image."""
    found: dict[str, list[int]] = {}
    for index, names in enumerate(kinds):
        for name in names:
            found.setdefault(name, []).append(index)
    return [Finding(kind, tuple(found[kind.name])) for kind in KINDS if kind.name in found]


def by_bucket(images: Sequence[SheetImage]) -> dict[Size, list[int]]:
    """Indexes of the images of each bucket, sorted by (width, height)."""
    found: dict[Size, list[int]] = {}
    for index, image in enumerate(images):
        found.setdefault(image.bucket, []).append(index)
    return dict(sorted(found.items()))


def sample(buckets: Mapping[Size, Sequence[int]], most: int) -> dict[Size, list[int]]:
    """Select about `most` images: evenly spaced within each bucket, in proportion to its size, at least one of each."""
    total = sum(map(len, buckets.values()))
    if total <= most:
        return {bucket: list(indexes) for bucket, indexes in buckets.items()}
    quotas = {bucket: max(1, len(indexes) * most // total) for bucket, indexes in buckets.items()}
    return {bucket: _spaced(buckets[bucket], quota) for bucket, quota in quotas.items()}


def _spaced(indexes: Sequence[int], count: int) -> list[int]:
    return [indexes[(2 * place + 1) * len(indexes) // (2 * count)] for place in range(count)]
