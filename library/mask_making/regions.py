"""What each source finds in an image, without a model: masks as uint8 (H, W), 255 = the subject."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np

from library.data import images
from library.mask_making.boxes import Box

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Mask = NDArray[np.uint8]
    Pixels = NDArray[np.uint8]

_LONGEST_SIDE = 512  # pixels at which GrabCut works; its time grows faster than the area
# Where nothing is known: what is background anyway, a share of the shorter side; and how far from each side to begin.
_MARGIN, _MIDDLE = 0.05, 0.15
_ROUNDS = 5


def from_opacity(opacity: Mask) -> Mask | None:
    """The opacity itself; None for an image without transparency, which says nothing about its subject."""
    return opacity if int(opacity.min()) < 255 else None


def unlike_colours(pixels: Pixels, colours: Iterable[tuple[int, int, int]], tolerance: int) -> Mask:
    """What differs by more than `tolerance` in red, green or blue from each of the colours. `pixels`: (H, W, 3) RGB."""
    mask = np.full(pixels.shape[:2], 255, dtype=np.uint8)
    for colour in colours:
        lower = [max(0, value - tolerance) for value in colour]
        upper = [min(255, value + tolerance) for value in colour]
        mask[cv2.inRange(pixels, np.array(lower), np.array(upper)) > 0] = 0
    return mask


def filled_boxes(shape: tuple[int, int], boxes: Iterable[Box]) -> Mask:
    """A mask (H, W) of `shape` with the boxes filled, as far as they are in the image."""
    mask = np.zeros(shape, dtype=np.uint8)
    for left, top, right, bottom in boxes:
        mask[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = 255
    return mask


def union(masks: Sequence[Mask], shape: tuple[int, int]) -> Mask:
    """The highest value of all masks in each pixel; black if there are none."""
    result = np.zeros(shape, dtype=np.uint8)
    for mask in masks:
        result = np.maximum(result, mask)
    return result


def cut_out(pixels: Pixels, area: Mask | None = None) -> Mask:
    """Cut the subject out of `area`: GrabCut (Rother, Kolmogorov and Blake, 2004) learns the colours outside of it.

    Without an area, it begins with the middle of the image, and all but a margin may be the subject. An area in which
    no subject stands out is returned whole; without one the result is then black. `pixels`: (H, W, 3) RGB.
    """
    height, width = pixels.shape[:2]
    scale = min(1.0, _LONGEST_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    marks = _marks(size) if area is None else _marks_of(images.resize(area, size, "area"))
    found = _grabcut(images.resize(pixels, size, "area"), marks)
    if not found.any():
        return np.zeros((height, width), dtype=np.uint8) if area is None else area
    mask = images.resize(np.where(found, 255, 0).astype(np.uint8), (width, height), "linear")
    mask = np.where(mask >= 128, 255, 0).astype(np.uint8)
    return mask if area is None else np.minimum(mask, area)


def _marks_of(area: Mask) -> NDArray[np.uint8]:
    return np.where(area >= 128, cv2.GC_PR_FGD, cv2.GC_BGD).astype(np.uint8)


def _marks(size: tuple[int, int]) -> NDArray[np.uint8]:
    width, height = size
    margin = max(1, round(_MARGIN * min(size)))
    right, bottom = round(_MIDDLE * width), round(_MIDDLE * height)
    marks = np.full((height, width), cv2.GC_BGD, dtype=np.uint8)
    marks[margin:-margin, margin:-margin] = cv2.GC_PR_BGD
    marks[max(margin, bottom) : -max(margin, bottom), max(margin, right) : -max(margin, right)] = cv2.GC_PR_FGD
    return marks


def _grabcut(pixels: Pixels, marks: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The subject, (H, W); all False if there is nothing to tell apart."""
    background, foreground = np.zeros((1, 65)), np.zeros((1, 65))  # their colour models
    bgr = np.ascontiguousarray(pixels[:, :, ::-1])
    cv2.setRNGSeed(0)  # it clusters colours from random starts; the seed belongs to the thread
    try:
        cv2.grabCut(bgr, marks, (0, 0, 0, 0), background, foreground, _ROUNDS, cv2.GC_INIT_WITH_MASK)
    except cv2.error:  # no pixel is inside, or none outside
        return np.zeros(marks.shape, dtype=bool)
    return np.asarray((marks == cv2.GC_FGD) | (marks == cv2.GC_PR_FGD))
