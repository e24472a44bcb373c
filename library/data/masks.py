"""What counts in an image: a mask beside it or its own transparency.

A mask is uint8 (H, W), 255 where the image counts fully; it goes through the geometry of its image. A mask file
counts by its red channel, as in kohya's sd-scripts and SimpleTuner; what is transparent in it does not count.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from PIL import Image

from library.data import images
from library.data.images import Geometry
from library.data.scan.mask_files import same_aspect_ratio
from library.options.datasets import Size
from library.options.mistakes import Mistake, UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Mask = NDArray[np.uint8]

_BLACK = (0, 0, 0)


def load(path: Path, expected: Size) -> Mask:
    """The mask of an image of the size `expected` (upright).

    One of another size is scaled if its sides are in the same proportion. Raises UserError naming the file if they are
    not, or if it cannot be decoded.
    """
    mask = images.decode(path, lambda image: images.to_rgb(image, _BLACK)[:, :, 0], "mask")
    size = (mask.shape[1], mask.shape[0])
    if not same_aspect_ratio(size, expected):
        what = f"mask {path} is {size[0]}x{size[1]} and its image {expected[0]}x{expected[1]}"
        raise UserError([Mistake(what, "a mask needs its image's size, or one in the same proportion, upright")])
    smaller = expected[0] <= size[0] and expected[1] <= size[1]
    return images.resize(mask, expected, "area" if smaller else "linear")  # Lanczos would leave rings beside edges


def of_alpha(path: Path, expected: Size | None = None) -> Mask:
    """The opacity of an image as its mask: white all over where nothing is transparent.

    Raises UserError as images.load does.
    """
    mask = images.decode(path, _opacity)
    size = (mask.shape[1], mask.shape[0])
    if expected is not None and size != expected:
        raise images.changed(path, size, expected)
    return mask


def _opacity(image: Image.Image) -> Mask:
    if not image.has_transparency_data:
        return np.full((image.height, image.width), 255, np.uint8)
    if image.mode.startswith("I"):  # 16-bit grey: one value is transparent, which PIL does not convert
        return np.where(np.asarray(image) == image.info["transparency"], 0, 255).astype(np.uint8)
    return np.asarray(image.convert("RGBA").getchannel("A"))


def apply(mask: Mask, shown: Geometry) -> Mask:
    """The part of a mask that belongs to what a sample shows: scaled, cut and mirrored exactly as the image."""
    # as an image, too: OpenCV rounds single channels otherwise
    return images.apply(np.asarray(cv2.cvtColor(mask, cv2.COLOR_GRAY2RGB), dtype=np.uint8), shown)[:, :, 0]


def to_float(mask: Mask) -> NDArray[np.float32]:
    """uint8 (H, W) to float32 (H, W) in [0, 1]."""
    return np.ascontiguousarray(mask, dtype=np.float32) / np.float32(255)


def to_latent_size(mask: torch.Tensor, size: Size) -> torch.Tensor:
    """Reduce a mask (H, W) float32 in [0, 1] to (1, h, w) float32 for latents of `size` (w, h).

    Each place gets the mean of the area it covers, pixels at its edge in part, so that the mean of the mask stays the
    same for any two sizes.
    """
    down, across = _overlaps(mask.shape[0], size[1]), _overlaps(mask.shape[1], size[0])
    return (down @ mask.double() @ across.T).float().clamp(0.0, 1.0)[None]


def _overlaps(pixels: int, places: int) -> torch.Tensor:
    """Share that each pixel has in each place, (places, pixels) float64, rows adding up to 1: torch's own area mode
    counts the pixel between two places in full for both."""
    edges = torch.arange(places + 1, dtype=torch.float64) * pixels / places
    starts = torch.arange(pixels, dtype=torch.float64)
    ends = torch.minimum(edges[1:, None], starts + 1)
    return (ends - torch.maximum(edges[:-1, None], starts)).clamp(min=0.0) * places / pixels
