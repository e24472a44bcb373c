"""Clean, grow, feather and invert a mask, uint8 (H, W)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Mask = NDArray[np.uint8]


def without_small_parts(mask: Mask, min_area: float) -> Mask:
    """Set connected parts (of pixels above 0, also across corners) to 0 that are smaller than this share of the
    image."""
    count, labels, facts, _ = cv2.connectedComponentsWithStats((mask > 0).astype(np.uint8), connectivity=8)
    kept = facts[:, cv2.CC_STAT_AREA] >= min_area * mask.size
    kept[0] = False  # what is 0 already
    return mask if count == 1 or kept[1:].all() else np.where(kept[labels], mask, 0).astype(np.uint8)


def padded(mask: Mask, pixels: int) -> Mask:
    """Let each pixel spread to a square of `pixels` on each side, as so many dilations of 3x3 do."""
    reach = min(pixels, max(mask.shape))
    if reach == 0:
        return mask
    return np.asarray(cv2.dilate(mask, np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)), dtype=np.uint8)


def feathered(mask: Mask, pixels: int) -> Mask:
    """Blur by a Gaussian that reaches `pixels` to each side: farther from an edge nothing changes, and the image's own
    edge is none."""
    if pixels == 0:
        return mask
    size = (2 * pixels + 1, 2 * pixels + 1)
    return np.asarray(cv2.GaussianBlur(mask, size, 0, borderType=cv2.BORDER_REPLICATE), dtype=np.uint8)


def shape(mask: Mask, *, padding: int, blur: int, invert: bool) -> Mask:
    """Grow, feather and invert, in this order."""
    mask = feathered(padded(mask, padding), blur)
    return 255 - mask if invert else mask
