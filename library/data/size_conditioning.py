"""Size and crop conditioning of Stable Diffusion XL (arXiv 2307.01952, section 2.2): original height, original width,
crop top, crop left, target height, target width.

The original size is that of the upright file before any resize, the target size that of the bucket. The crop is the
top left corner of the bucket in the resized image, in its pixels, whether the image was downscaled, upscaled or kept.
For a flipped sample, left is counted in the mirrored image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.data.images import crop_ltrb

if TYPE_CHECKING:
    from library.data.images import Geometry
    from library.options.datasets import Size
    from library.options.groups.dataset import CropConditioning

Sizes = tuple[int, int, int, int, int, int]


def sizes_of(geometry: Geometry, original: Size, mode: CropConditioning = "exact") -> Sizes:
    """Size conditioning of a sample with this geometry of an image of size `original` (width, height, upright)."""
    left, top = (
        crop_ltrb(geometry)[:2] if mode == "exact" else letterbox(geometry.bucket, original, flipped=geometry.flipped)
    )
    return original[1], original[0], top, left, geometry.bucket[1], geometry.bucket[0]


def letterbox(bucket: Size, original: Size, *, flipped: bool = False) -> tuple[int, int]:
    """Left and top as in sd-scripts, regardless of the sample's crop: the margins of the whole image fitted into the
    bucket. A crop covers the bucket instead, so these are 0 where it cuts and not 0 where it does not
    (kohya-ss/sd-scripts issue 1443).

    From library/train_util.py there: BucketManager.get_crop_ltrb, and for flipped samples the right margin, rounded
    down too. Not reproduced: (0, 0) for uncached samples without buckets, and (bucket width, 0) if flipped.
    """
    width, height = bucket
    aspect = original[0] / original[1]
    if width / height > aspect:
        fitted_width, fitted_height = height * aspect, float(height)
    else:
        fitted_width, fitted_height = float(width), width / aspect
    left, top = (width - fitted_width) // 2, (height - fitted_height) // 2
    return int(width - (left + fitted_width)) if flipped else int(left), int(top)
