"""Sizes to train at: the list of buckets and which image goes where.

Rule "kohya" is that of kohya's sd-scripts, "area" and "shorter_edge" are those of SimpleTuner, so that a data set falls
into the buckets its owner knows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from library.data.scan.scan import ImageRecord
from library.options.datasets import BucketSettings, DatasetSpec, Size
from library.options.mistakes import Mistake

Place = tuple[int, Size]  # dataset index, bucket


@dataclass(frozen=True)
class Placement:
    """The image is scaled to `resized`, which covers `bucket`, and cropped to `bucket`."""

    bucket: Size
    resized: Size


@dataclass(frozen=True)
class BucketTable:
    """Where every record goes. Counts are per dataset and bucket, sorted by (dataset, (width, height)); `samples`
    counts images x repeats."""

    placements: tuple[Placement, ...]  # per record
    images: Mapping[Place, int]
    samples: Mapping[Place, int]
    enlarged: int  # images scaled up
    mistakes: tuple[Mistake, ...]


def make_buckets(resolution: Size, smallest: int, largest: int, step: int) -> list[Size]:
    """All sizes whose sides are multiples of `step` between the limits and whose area is at most that of `resolution`,
    each as large as its width allows. The lower limit is rounded down to `step`, the upper one up."""
    smallest = max(step, smallest // step * step)
    largest = -(-largest // step) * step
    area = resolution[0] * resolution[1]
    side = math.isqrt(area) // step * step
    found = {(side, side)}
    for width in range(smallest, largest + 1, step):
        height = min(largest, area // width // step * step)
        if height >= smallest:
            found |= {(width, height), (height, width)}
    return sorted(found)


def bucket_list(chosen: BucketSettings) -> list[Size]:
    """The buckets that `assign` chooses from; empty where an image's bucket is not chosen from a list."""
    if not chosen.enabled or chosen.no_upscale or chosen.rule != "kohya":
        return []
    return make_buckets(chosen.resolution, chosen.smallest, chosen.largest, chosen.step)


def assign(size: Size, chosen: BucketSettings, buckets: Sequence[Size]) -> Placement | None:
    """Bucket and scaled size of an image; None if a side of its bucket would be 0. `buckets`: see bucket_list."""
    if not chosen.enabled:
        return _scale(size, chosen.resolution, chosen)
    if chosen.rule != "kohya":
        return _scale(size, _own_bucket(size, chosen), chosen)
    if chosen.no_upscale:
        return _without_upscaling(size, chosen.resolution, chosen.step)
    if size in buckets:
        return Placement(size, size)
    aspect = size[0] / size[1]
    return _cover(size, min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - aspect)))


def _own_bucket(size: Size, chosen: BucketSettings) -> Size:
    """The image's own aspect at the resolution's area, or at a shorter edge of the resolution's width."""
    width, height = size
    aspect = width / height
    if chosen.rule == "area":
        edge: float = nearest(math.sqrt(chosen.resolution[0] * chosen.resolution[1]), chosen.step)
        sides = edge * math.sqrt(aspect), edge / math.sqrt(aspect)
    else:
        edge = chosen.resolution[0]
        sides = (edge, edge / aspect) if width < height else (edge * aspect, edge)
    return nearest(sides[0], chosen.step), nearest(sides[1], chosen.step)


def nearest(length: float, step: int) -> int:
    """The multiple of `step` next to a length, at least one step; a tie goes to the even multiple."""
    return max(1, round(length / step)) * step


def _scale(size: Size, bucket: Size, chosen: BucketSettings) -> Placement:
    """Scale to what `shrink_to` says where that covers the bucket, else just so that it is covered."""
    if chosen.shrink_to is not None:
        width, height = size
        if chosen.rule == "shorter_edge":
            factor = chosen.shrink_to / min(size)
        else:
            factor = math.sqrt(chosen.shrink_to / (width * height))
        resized = (int(width * factor + 0.5), int(height * factor + 0.5))
        if resized[0] >= bucket[0] and resized[1] >= bucket[1]:
            return Placement(bucket, resized)
    return _cover(size, bucket)


def _cover(size: Size, bucket: Size) -> Placement:
    """Scale one side to the bucket's, so that the other is at least as long."""
    width, height = size
    if width / height > bucket[0] / bucket[1]:
        resized = (int(width * (bucket[1] / height) + 0.5), bucket[1])
    else:
        resized = (bucket[0], int(height * (bucket[0] / width) + 0.5))
    return Placement(bucket, resized)


def _without_upscaling(size: Size, resolution: Size, step: int) -> Placement | None:
    width, height = size
    area = resolution[0] * resolution[1]
    resized = size
    if width * height > area:
        aspect = width / height
        ideal_width = math.sqrt(area * aspect)
        by_width = _round_to(ideal_width, step)
        by_height = _round_to(area / ideal_width, step)
        height_of_width = _round_to(by_width / aspect, step)
        width_of_height = _round_to(by_height * aspect, step)
        error_by_width = abs(by_width / height_of_width - aspect) if height_of_width else math.inf
        error_by_height = abs(width_of_height / by_height - aspect) if by_height else math.inf
        if error_by_width < error_by_height:
            resized = (by_width, int(by_width / aspect + 0.5))
        else:
            resized = (int(by_height * aspect + 0.5), by_height)
    bucket = (resized[0] // step * step, resized[1] // step * step)
    return Placement(bucket, resized) if min(bucket) > 0 else None


def _round_to(length: float, step: int) -> int:
    return int(length + 0.5) // step * step


def make_table(records: Sequence[ImageRecord], datasets: Sequence[DatasetSpec]) -> BucketTable:
    """Place every record by the buckets of its dataset, `datasets[record.dataset]`. No image is left out because its
    bucket is small or smaller than a batch."""
    lists = [bucket_list(dataset.buckets) for dataset in datasets]
    known: dict[Place, Placement | None] = {}  # by the image's size
    placements: list[Placement] = []
    images: dict[Place, int] = {}
    samples: dict[Place, int] = {}
    mistakes: list[Mistake] = []
    enlarged = 0
    for record in records:
        wanted = (record.dataset, record.size)
        if wanted not in known:
            known[wanted] = assign(record.size, datasets[record.dataset].buckets, lists[record.dataset])
        placement = known[wanted]
        if placement is None:
            mistakes.append(_too_thin(record, datasets[record.dataset]))
            continue
        placements.append(placement)
        place = (record.dataset, placement.bucket)
        images[place] = images.get(place, 0) + 1
        samples[place] = samples.get(place, 0) + record.repeats
        enlarged += placement.resized[0] > record.size[0] or placement.resized[1] > record.size[1]
    return BucketTable(
        tuple(placements), dict(sorted(images.items())), dict(sorted(samples.items())), enlarged, tuple(mistakes)
    )


def _too_thin(record: ImageRecord, dataset: DatasetSpec) -> Mistake:
    width, height = record.size
    return Mistake(
        f"{record.path} ({width}x{height}): with bucket_no_upscale a side is less than "
        f"bucket_reso_steps = {dataset.buckets.step} ({dataset.origin})",
        "remove the image, lower bucket_reso_steps, or leave bucket_no_upscale out",
    )
