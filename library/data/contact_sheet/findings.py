"""What of the images a person should look at, and which are shown where there are too many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from library.data.contact_sheet.records import Page, Shown, Size
from library.data.contact_sheet.thumbnails import Thumbnail

MUCH_CUT_AWAY = 0.25
"""Share of an image's area outside the crop from which on it is named."""


@dataclass(frozen=True)
class Kind:
    """A thing that can be wrong with an image. The sentences go on after "1 image " and "7 images "."""

    name: str
    label: str  # in the filter and on the image's card
    one: str
    many: str
    severe: bool = False


KINDS = (
    Kind("damaged", "cannot be opened", "cannot be opened", "cannot be opened", severe=True),
    Kind("mask-damaged", "mask cannot be used",
         "has a mask that cannot be used", "have masks that cannot be used", severe=True),
    Kind("cut", "caption is cut", "has a caption longer than {limit} tokens: the rest is cut off",
         "have captions longer than {limit} tokens: the rest is cut off"),
    Kind("empty", "no caption", "is trained without a caption in every epoch shown",
         "are trained without a caption in every epoch shown"),
    Kind("unmasked", "no mask", "has no mask, though others of its subset have one",
         "have no mask, though others of their subset have one"),
    Kind("black", "mask is black", "has a mask that is black all over", "have a mask that is black all over"),
    Kind("enlarged", "enlarged", "is smaller than its bucket asks for and is enlarged",
         "are smaller than their bucket asks for and are enlarged"),
    Kind("cropped", "much is cut away", "loses more than a quarter of its area to the crop",
         "lose more than a quarter of their area to the crop"),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """Images, by index, of which the same can be said."""

    kind: Kind
    images: tuple[int, ...]


def judge(page: Page, opened: Mapping[int, Thumbnail]) -> tuple[tuple[str, ...], ...]:
    """Per image the names of its kinds. Whether it can be opened is known of those in `opened` only."""
    masked = {one.subset for one in page.shown if one.mask is not None}
    return tuple(
        (*_of_files(opened.get(index)), *_of_record(one, page.token_limit, masks_expected=one.subset in masked))
        for index, one in enumerate(page.shown)
    )


def _of_files(thumbnail: Thumbnail | None) -> list[str]:
    if thumbnail is None:
        return []
    found = {
        "damaged": bool(thumbnail.error),
        "mask-damaged": bool(thumbnail.mask_error),
        "black": thumbnail.learnt == 0,
    }
    return [name for name, there in found.items() if there]


def _of_record(one: Shown, token_limit: int, *, masks_expected: bool) -> list[str]:
    found = {
        "cut": any(caption.tokens > token_limit for caption in one.captions),
        "empty": not any(caption.text.strip() for caption in one.captions),
        "unmasked": masks_expected and one.mask is None,
        "enlarged": one.enlarged > 1,
        "cropped": one.cut_away > MUCH_CUT_AWAY,
    }
    return [name for name, there in found.items() if there]


def findings(judged: Sequence[Sequence[str]]) -> list[Finding]:
    """The kinds that occur, worst first."""
    found: dict[str, list[int]] = {}
    for index, names in enumerate(judged):
        for name in names:
            found.setdefault(name, []).append(index)
    return [Finding(kind, tuple(found[kind.name])) for kind in KINDS if kind.name in found]


def by_bucket(shown: Sequence[Shown]) -> dict[Size, list[int]]:
    """Indexes of the images of every bucket, buckets sorted by (width, height)."""
    found: dict[Size, list[int]] = {}
    for index, one in enumerate(shown):
        found.setdefault(one.bucket, []).append(index)
    return dict(sorted(found.items()))


def sample(buckets: Mapping[Size, Sequence[int]], most: int) -> dict[Size, list[int]]:
    """About `most` images if there are more: evenly spaced in every bucket, by its share of them but one at least."""
    total = sum(map(len, buckets.values()))
    if total <= most:
        return {bucket: list(indexes) for bucket, indexes in buckets.items()}
    quotas = {bucket: max(1, len(indexes) * most // total) for bucket, indexes in buckets.items()}
    return {bucket: _spaced(buckets[bucket], quota) for bucket, quota in quotas.items()}


def _spaced(indexes: Sequence[int], count: int) -> list[int]:
    return [indexes[(2 * place + 1) * len(indexes) // (2 * count)] for place in range(count)]
