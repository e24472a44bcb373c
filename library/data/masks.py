"""Loss masks: from a mask file or the image's transparency.

A mask is uint8 (H, W), 255 = full loss, with the same scaling, crop and flip as its image. A mask file counts by its
luminance; its transparent areas are masked out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch

from library.data import images
from library.data.decoding import decode, luminance, opacity
from library.data.image_files import ImageSource
from library.data.images import Geometry
from library.data.scan.mask_files import same_aspect_ratio
from library.options.datasets import Size
from library.options.mistakes import Mistake, UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Mask = NDArray[np.uint8]


def load(path: ImageSource, expected: Size) -> Mask:
    """Load the mask of an image of size `expected` (upright).

    A mask of another size with the same aspect ratio is scaled. Raises UserError naming the file for another aspect
    ratio, and for a file that cannot be decoded.
    """
    mask = np.asarray(decode(path, luminance, "mask"))
    size = (mask.shape[1], mask.shape[0])
    if not same_aspect_ratio(size, expected):
        what = f"mask {path} is {size[0]}x{size[1]}, its image {expected[0]}x{expected[1]}"
        raise UserError([Mistake(what, "resize it to the size or aspect ratio of its upright image")])
    smaller = expected[0] <= size[0] and expected[1] <= size[1]
    return images.resize(mask, expected, "area" if smaller else "linear")  # Lanczos would leave rings at edges


def from_transparency(path: ImageSource, expected: Size | None = None) -> Mask:
    """Use the opacity of an image as its mask, 255 = opaque. Raises UserError like images.load."""
    mask = np.asarray(decode(path, opacity))
    size = (mask.shape[1], mask.shape[0])
    if expected is not None and size != expected:
        raise images.size_changed(path, size, expected)
    return mask


def apply(mask: Mask, geometry: Geometry) -> Mask:
    """Scale, crop and flip a mask exactly like its image."""
    # with three channels like an image, because OpenCV rounds single channels differently
    return images.apply(np.asarray(cv2.cvtColor(mask, cv2.COLOR_GRAY2RGB), dtype=np.uint8), geometry)[:, :, 0]


def to_float(mask: Mask) -> NDArray[np.float32]:
    """uint8 (H, W) to float32 (H, W) in [0, 1]."""
    return np.ascontiguousarray(mask, dtype=np.float32) / np.float32(255)


def to_latent_size(mask: torch.Tensor, size: Size) -> torch.Tensor:
    """Reduce a mask (H, W) float32 in [0, 1] to (1, h, w) float32 for latents of `size` (w, h).

    Each latent gets the mean of the area it covers, weighting pixels at its edge by their share, so the mean of the
    mask is preserved for any sizes.
    """
    down, across = _overlaps(mask.shape[0], size[1]), _overlaps(mask.shape[1], size[0])
    return (down @ mask.double() @ across.T).float().clamp(0.0, 1.0)[None]


def _overlaps(pixels: int, positions: int) -> torch.Tensor:
    """Weight of each pixel in each output position, (positions, pixels) float64, rows sum to 1. torch's area mode would
    count a pixel between two positions fully for both."""
    edges = torch.arange(positions + 1, dtype=torch.float64) * pixels / positions
    starts = torch.arange(pixels, dtype=torch.float64)
    ends = torch.minimum(edges[1:, None], starts + 1)
    return (ends - torch.maximum(edges[:-1, None], starts)).clamp(min=0.0) * positions / pixels
