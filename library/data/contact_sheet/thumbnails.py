"""Thumbnails inside the page: the crop and its mask as data: URIs.

A mask becomes an alpha channel that is opaque where the loss is masked out, so that CSS can hatch just that area.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from library.options.mistakes import UserError
from library.runtime.progress import ProgressBar

if TYPE_CHECKING:
    from numpy.typing import NDArray

Read = Callable[[], "NDArray[np.uint8]"]

_SIDES = ((100, 384), (400, 256))  # (most images, longer side in pixels)
_SMALLEST_SIDE = 160
_QUALITY = 78


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """`image` and `mask` are data: URIs or ""; `learnt` is the mean of the mask in [0, 1]."""

    image: str = ""
    mask: str = ""
    learnt: float | None = None
    error: str = ""  # why there is no image
    mask_error: str = ""


def longest_side(images: int) -> int:
    """Longer side in pixels of the thumbnails, chosen by the number of images to keep the file small."""
    return next((side for most, side in _SIDES if images <= most), _SMALLEST_SIDE)


def make_thumbnails(reads: Sequence[tuple[Read, Read | None]], *, progress: bool = False) -> list[Thumbnail]:
    """Make the thumbnail of each image and its mask, which calls read: (H, W, 3) RGB and (H, W), 255 = full loss.

    They are called from several threads. Errors are stored in the thumbnail, never raised. `progress` shows a progress
    bar on stderr.
    """
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # decoding and scaling release the GIL
    try:
        thumbnails = pool.map(partial(_thumbnail, side=longest_side(len(reads))), reads)
        return list(ProgressBar("contact sheet", len(reads), shown=progress).over(thumbnails))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits only for the images being decoded


def _thumbnail(reads: tuple[Read, Read | None], side: int) -> Thumbnail:
    read, read_mask = reads
    try:
        pixels = read()
        thumbnail = _webp(_shrink(Image.fromarray(np.ascontiguousarray(pixels)), side))
    except Exception as error:  # noqa: BLE001 - the page shows every error
        return Thumbnail(error=_reason(error))
    if read_mask is None:
        return Thumbnail(thumbnail)
    try:
        mask, learnt = _mask(read_mask, pixels.shape[:2], side)
    except Exception as error:  # noqa: BLE001 - as above
        return Thumbnail(thumbnail, mask_error=_reason(error))
    return Thumbnail(thumbnail, mask, learnt)


def _mask(read: Read, shape: tuple[int, ...], side: int) -> tuple[str, float]:
    mask = read()
    if mask.shape != shape:
        raise ValueError(f"the mask is {mask.shape[1]}x{mask.shape[0]} and the crop {shape[1]}x{shape[0]}")
    alpha = _shrink(Image.fromarray(np.ascontiguousarray(255 - mask)), side)
    black = Image.new("L", alpha.size)
    return _webp(Image.merge("RGBA", (black, black, black, alpha))), float(mask.mean()) / 255


def _shrink(image: Image.Image, side: int) -> Image.Image:
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return image


def _webp(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=_QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _reason(error: Exception) -> str:
    if isinstance(error, UserError):
        return "; ".join(mistake.what for mistake in error.mistakes)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
