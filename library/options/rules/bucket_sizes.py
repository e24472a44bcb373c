"""Resolution and bucket limits that training can use, whether they are flags or keys of a dataset file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from library.options.datasets import BucketSettings, Size
from library.options.mistakes import Mistakes

LATENT_STRIDE = 8  # pixels per latent; image sides are multiples of it
SMALLEST_SIDE = 64

Describe = Callable[[str, Any], str]
"""A setting for messages, from its name in kohya's files and its value."""


def usable_sizes(buckets: BucketSettings, describe: Describe, mistakes: Mistakes, notes: list[str]) -> BucketSettings:
    """Round sizes to what training can use, with a note for each, and check them.

    Without buckets the resolution is rounded down to the latent stride. With buckets only its area counts, as in
    sd-scripts, and the limits are widened to multiples of the steps: the minimum down, the maximum up.
    """
    if not buckets.enabled:
        buckets = _round_resolution(buckets, describe, notes)
    else:
        buckets = whole_steps(buckets, describe, notes)
    if min(buckets.resolution) < SMALLEST_SIDE:
        what = f"{describe('resolution', buckets.resolution)} is below {SMALLEST_SIDE} pixels"
        mistakes.add(what, f"use at least {SMALLEST_SIDE}")
        return buckets
    if not buckets.enabled:
        return buckets
    if any(side % buckets.step for side in buckets.resolution):
        sides = f"the sides of a bucket are multiples of {buckets.step}"
        notes.append(f"{describe('resolution', buckets.resolution)}: only its area counts; {sides}")
    if buckets.no_upscale:  # a bucket is then as large as its images, and the limits have no meaning
        return buckets
    widened = _widen_limits(buckets, describe, notes)
    _check_limits(buckets, widened, describe, mistakes)
    return widened


def whole_steps(buckets: BucketSettings, describe: Describe, notes: list[str]) -> BucketSettings:
    """Round the steps of bucket sides up to a multiple of the latent stride, with a note."""
    step = -(-buckets.step // LATENT_STRIDE) * LATENT_STRIDE
    if step != buckets.step:
        notes.append(f"{describe('bucket_reso_steps', buckets.step)} becomes {step}, a multiple of {LATENT_STRIDE}")
    return replace(buckets, step=step)


def _round_resolution(buckets: BucketSettings, describe: Describe, notes: list[str]) -> BucketSettings:
    width, height = (side // LATENT_STRIDE * LATENT_STRIDE for side in buckets.resolution)
    rounded: Size = (width, height)
    if rounded == buckets.resolution or min(rounded) < SMALLEST_SIDE:
        return buckets
    notes.append(
        f"{describe('resolution', buckets.resolution)} becomes {width}x{height}: sides are multiples of {LATENT_STRIDE}"
    )
    return replace(buckets, resolution=rounded)


def _widen_limits(buckets: BucketSettings, describe: Describe, notes: list[str]) -> BucketSettings:
    step = buckets.step
    smallest, largest = max(step, buckets.smallest // step * step), -(-buckets.largest // step) * step
    multiple = f"a multiple of {describe('bucket_reso_steps', step)}"
    if smallest != buckets.smallest:
        notes.append(f"{describe('min_bucket_reso', buckets.smallest)} becomes {smallest}, {multiple}")
    if largest != buckets.largest:
        notes.append(f"{describe('max_bucket_reso', buckets.largest)} becomes {largest}, {multiple}")
    return replace(buckets, smallest=smallest, largest=largest)


def _check_limits(given: BucketSettings, widened: BucketSettings, describe: Describe, mistakes: Mistakes) -> None:
    """Check the widened limits. Mistakes name the limits as they were given."""
    least, most = describe("min_bucket_reso", given.smallest), describe("max_bucket_reso", given.largest)
    resolution = describe("resolution", given.resolution)
    shortest, longest = min(given.resolution), max(given.resolution)
    if widened.smallest > widened.largest:
        mistakes.add(f"{least} is more than {most}", "swap the two values")
        return
    if shortest < widened.smallest:
        if widened.smallest > given.smallest:
            least = describe("bucket_reso_steps", given.step)
        what = f"{resolution} is smaller than {least}, the shortest side of a bucket"
        too_large = "bucket_reso_steps" if widened.smallest == widened.step else "min_bucket_reso"
        mistakes.add(what, f"set {too_large} to at most {shortest}")
    if longest > widened.largest:
        what = f"{resolution} is larger than {most}, the longest side of a bucket"
        mistakes.add(what, f"set max_bucket_reso to at least {longest}")
