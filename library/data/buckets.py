"""Buckets: their sizes, and the bucket of each image.

Rule "kohya" is that of kohya's sd-scripts; "area" and "shorter_edge" are those of SimpleTuner.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from library.data.scan.image_record import ImageRecord
from library.messages import counted
from library.options.datasets import BucketSettings, DatasetSpec, Size
from library.options.rules.bucket_sizes import LATENT_STRIDE

Place = tuple[int, Size]  # dataset index, bucket


@dataclass(frozen=True)
class Placement:
    """An image is scaled to `resized`, which covers `bucket`, and cropped to `bucket`."""

    bucket: Size
    resized: Size


@dataclass(frozen=True)
class BucketTable:
    """The placement of every record. Counts are per dataset and bucket, sorted by (dataset, (width, height)); `samples`
    are images x repeats. `notes` tell of images that are narrower than the steps of their bucket."""

    placements: tuple[Placement, ...]  # per record
    images: Mapping[Place, int]
    samples: Mapping[Place, int]
    enlarged: int  # upscaled images
    notes: tuple[str, ...]


def make_buckets(resolution: Size, smallest: int, largest: int, step: int) -> list[Size]:
    """All sizes whose sides are multiples of `step` between the limits and whose area is at most that of `resolution`,
    each as large as its width allows. The lower limit is rounded down to `step`, the upper one up."""
    smallest = max(step, smallest // step * step)
    largest = -(-largest // step) * step
    area = resolution[0] * resolution[1]
    side = math.isqrt(area) // step * step
    buckets = {(side, side)}
    for width in range(smallest, largest + 1, step):
        height = min(largest, area // width // step * step)
        if height >= smallest:
            buckets |= {(width, height), (height, width)}
    return sorted(buckets)


def bucket_list(settings: BucketSettings) -> list[Size]:
    """The buckets that `assign_bucket` selects from; empty if the rule computes a bucket per image."""
    if not settings.enabled or settings.no_upscale or settings.rule != "kohya":
        return []
    return make_buckets(settings.resolution, settings.smallest, settings.largest, settings.step)


def assign_bucket(size: Size, settings: BucketSettings, buckets: Sequence[Size]) -> Placement:
    """Bucket and resized size of an image. `buckets`: see bucket_list."""
    if not settings.enabled:
        return _scale(size, settings.resolution, settings)
    if settings.rule != "kohya":
        return _scale(size, _own_bucket(size, settings), settings)
    if settings.no_upscale:
        return _without_upscaling(size, settings.resolution, settings.step)
    if size in buckets:
        return Placement(size, size)
    aspect = size[0] / size[1]
    return _cover(size, min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - aspect)))


def _own_bucket(size: Size, settings: BucketSettings) -> Size:
    """The image's aspect ratio at the resolution's area, or with the resolution's width as shorter edge."""
    width, height = size
    aspect = width / height
    if settings.rule == "area":
        edge: float = nearest(math.sqrt(settings.resolution[0] * settings.resolution[1]), settings.step)
        sides = edge * math.sqrt(aspect), edge / math.sqrt(aspect)
    else:
        edge = settings.resolution[0]
        sides = (edge, edge / aspect) if width < height else (edge * aspect, edge)
    return nearest(sides[0], settings.step), nearest(sides[1], settings.step)


def nearest(length: float, step: int) -> int:
    """The multiple of `step` nearest to a length, at least one step; ties go to the even multiple."""
    return max(1, round(length / step)) * step


def _scale(size: Size, bucket: Size, settings: BucketSettings) -> Placement:
    """Scale to the size of `shrink_to` if that covers the bucket, else to the smallest size that does."""
    if settings.shrink_to is not None:
        width, height = size
        if settings.rule == "shorter_edge":
            factor = settings.shrink_to / min(size)
        else:
            factor = math.sqrt(settings.shrink_to / (width * height))
        resized = (int(width * factor + 0.5), int(height * factor + 0.5))
        if resized[0] >= bucket[0] and resized[1] >= bucket[1]:
            return Placement(bucket, resized)
    return _cover(size, bucket)


def _cover(size: Size, bucket: Size) -> Placement:
    """Scale to the smallest size that covers the bucket."""
    width, height = size
    if width / height > bucket[0] / bucket[1]:
        resized = (int(width * (bucket[1] / height) + 0.5), bucket[1])
    else:
        resized = (bucket[0], int(height * (bucket[0] / width) + 0.5))
    return Placement(bucket, resized)


def _without_upscaling(size: Size, resolution: Size, step: int) -> Placement:
    """A bucket as large as the image, or of the resolution's area. An image narrower than a step is measured in
    latents (where sd-scripts divides by zero), and enlarged if it is narrower than one."""
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
    if min(bucket) > 0:
        return Placement(bucket, resized)
    if step > LATENT_STRIDE:
        return _without_upscaling(size, resolution, LATENT_STRIDE)
    return _cover(size, (max(bucket[0], LATENT_STRIDE), max(bucket[1], LATENT_STRIDE)))


def _round_to(length: float, step: int) -> int:
    return int(length + 0.5) // step * step


def build_bucket_table(records: Sequence[ImageRecord], datasets: Sequence[DatasetSpec]) -> BucketTable:
    """Assign every record to a bucket of its dataset, `datasets[record.dataset]`. Keeps the images of buckets smaller
    than a batch."""
    lists = [bucket_list(dataset.buckets) for dataset in datasets]
    known: dict[Place, Placement] = {}  # by the image's size
    placements: list[Placement] = []
    images: dict[Place, int] = {}
    samples: dict[Place, int] = {}
    narrow: dict[int, list[ImageRecord]] = {}  # by dataset
    enlarged = 0
    for record in records:
        settings = datasets[record.dataset].buckets
        dataset_and_size = (record.dataset, record.size)
        if dataset_and_size not in known:
            known[dataset_and_size] = assign_bucket(record.size, settings, lists[record.dataset])
        placement = known[dataset_and_size]
        placements.append(placement)
        place = (record.dataset, placement.bucket)
        images[place] = images.get(place, 0) + 1
        samples[place] = samples.get(place, 0) + record.repeats
        enlarged += placement.resized[0] > record.size[0] or placement.resized[1] > record.size[1]
        if settings.enabled and settings.no_upscale and min(placement.bucket) < settings.step:
            narrow.setdefault(record.dataset, []).append(record)
    notes = tuple(_narrow(found, datasets[dataset]) for dataset, found in narrow.items())
    return BucketTable(tuple(placements), dict(sorted(images.items())), dict(sorted(samples.items())), enlarged, notes)


def _narrow(records: Sequence[ImageRecord], dataset: DatasetSpec) -> str:
    (width, height), verb = records[0].size, "is" if len(records) == 1 else "are"
    return (
        f"{counted(len(records), 'image')} {verb} narrower than bucket_reso_steps = {dataset.buckets.step} "
        f"({dataset.origin}), for example {records[0].path} ({width}x{height}): the sides of their buckets are "
        f"multiples of {LATENT_STRIDE}"
    )
