"""What a model is told of an image's size and crop: six numbers, the micro-conditioning of Stable Diffusion XL
(arXiv 2307.01952, section 2.2): original height, original width, crop top, crop left, target height, target width.

The original size is that of the upright file before any resize, the target size that of the bucket. The crop is where
the bucket begins in the image as it was scaled for the sample, in pixels of that: larger than the bucket by what was
cut away, whether the image shrank, was enlarged to cover the bucket or was left as it is. A sample that is mirrored
shows a part of the mirrored image, so its left edge is counted there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.data.images import crop_ltrb

if TYPE_CHECKING:
    from library.data.images import Geometry
    from library.options.datasets import Size
    from library.options.groups.dataset import CropConditioning

Sizes = tuple[int, int, int, int, int, int]


def sizes_of(shown: Geometry, original: Size, mode: CropConditioning = "exact") -> Sizes:
    """The six numbers of a sample: an image of the size `original` (width, height, upright) shown as `shown`."""
    left, top = crop_ltrb(shown)[:2] if mode == "exact" else letterbox(shown.bucket, original, flipped=shown.flipped)
    return original[1], original[0], top, left, shown.bucket[1], shown.bucket[0]


def letterbox(bucket: Size, original: Size, *, flipped: bool = False) -> tuple[int, int]:
    """Left and top as sd-scripts computes them, whatever the sample's crop is: the margins of the bucket when the whole
    image is scaled to fit into it. A crop covers the bucket instead, so these are zero where that cuts and the other
    way round (kohya-ss/sd-scripts issue 1443).

    After library/train_util.py there: BucketManager.get_crop_ltrb, and for mirrored samples the right margin, whose
    fraction is dropped too. Not followed: uncached samples without buckets, which it tells (0, 0), and mirrored
    (bucket's width, 0).
    """
    width, height = bucket
    aspect = original[0] / original[1]
    if width / height > aspect:
        fitted_width, fitted_height = height * aspect, float(height)
    else:
        fitted_width, fitted_height = float(width), width / aspect
    left, top = (width - fitted_width) // 2, (height - fitted_height) // 2
    return int(width - (left + fitted_width)) if flipped else int(left), int(top)
