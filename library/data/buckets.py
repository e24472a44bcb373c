"""Sizes to train at: the list of buckets and which picture goes where.

The rules are those of kohya's sd-scripts, so that a data set falls into the buckets its owner knows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from library.data.scan import ImageRecord
from library.options.dataset import DatasetOptions
from library.options.mistakes import Mistake

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class BucketSettings:
    """What decides the bucket of a picture. Lengths in pixels."""

    resolution: Size
    enabled: bool = False
    no_upscale: bool = False
    smallest: int = 256
    largest: int = 1024
    step: int = 64


@dataclass(frozen=True)
class Placement:
    """The picture is scaled to `resized`, which covers `bucket`, and cropped to `bucket`."""

    bucket: Size
    resized: Size


@dataclass(frozen=True)
class BucketTable:
    """Where every record goes. `samples` counts pictures x repeats per bucket, sorted by (width, height)."""

    placements: tuple[Placement, ...]  # per record
    pictures: Mapping[Size, int]
    samples: Mapping[Size, int]
    enlarged: int  # pictures scaled up
    mistakes: tuple[Mistake, ...]


def settings(options: DatasetOptions) -> BucketSettings:
    """The bucket settings of the options. Raises ValueError without a resolution."""
    if options.resolution is None:
        raise ValueError("no resolution")
    return BucketSettings(
        resolution=options.resolution,
        enabled=options.enable_bucket,
        no_upscale=options.bucket_no_upscale,
        smallest=options.min_bucket_reso,
        largest=options.max_bucket_reso,
        step=options.bucket_reso_steps,
    )


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


def assign(size: Size, chosen: BucketSettings, buckets: Sequence[Size]) -> Placement | None:
    """Bucket and scaled size of a picture; None if a side of its bucket would be 0.

    `buckets` comes from make_buckets; it is not used without buckets or with no_upscale.
    """
    if not chosen.enabled:
        return _cover(size, chosen.resolution)
    if chosen.no_upscale:
        return _without_upscaling(size, chosen.resolution, chosen.step)
    if size in buckets:
        return Placement(size, size)
    aspect = size[0] / size[1]
    return _cover(size, min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - aspect)))


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


def make_table(records: Sequence[ImageRecord], chosen: BucketSettings) -> BucketTable:
    """Place every record. No picture is left out because its bucket is small or smaller than a batch."""
    buckets = make_buckets(chosen.resolution, chosen.smallest, chosen.largest, chosen.step) if chosen.enabled else []
    known: dict[Size, Placement | None] = {}
    placements: list[Placement] = []
    pictures: dict[Size, int] = {}
    samples: dict[Size, int] = {}
    mistakes: list[Mistake] = []
    enlarged = 0
    for record in records:
        if record.size not in known:
            known[record.size] = assign(record.size, chosen, buckets)
        placement = known[record.size]
        if placement is None:
            mistakes.append(_too_thin(record, chosen.step))
            continue
        placements.append(placement)
        pictures[placement.bucket] = pictures.get(placement.bucket, 0) + 1
        samples[placement.bucket] = samples.get(placement.bucket, 0) + record.repeats
        enlarged += placement.resized[0] > record.size[0] or placement.resized[1] > record.size[1]
    return BucketTable(
        tuple(placements), dict(sorted(pictures.items())), dict(sorted(samples.items())), enlarged, tuple(mistakes)
    )


def _too_thin(record: ImageRecord, step: int) -> Mistake:
    width, height = record.size
    return Mistake(
        f"{record.path} ({width}x{height}): with --bucket_no_upscale a side is less than --bucket_reso_steps={step}",
        "remove the picture, lower --bucket_reso_steps, or leave --bucket_no_upscale out",
    )
