"""From a picture file to the pixels of one sample; resizing and variation as in kohya's sd-scripts.

PIL decodes (OpenCV drops transparency and cannot open names outside ASCII on Windows); OpenCV only scales down.
Arrays are uint8 (H, W, 3) RGB until the last step. All chance comes from the generator that is passed in.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, ImageOps

from library.data.buckets import Placement, Size
from library.options.dataset import DatasetOptions
from library.options.mistakes import Mistake, UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

_COLOUR_SHARE = 0.33
_HUE_SHIFT = 8  # OpenCV hue: 180 steps to the circle
_GAMMA = (0.95, 1.05)


@dataclass(frozen=True)
class ImageSettings:
    """What is varied from sample to sample."""

    random_crop: bool = False
    flip: bool = False
    colour: bool = False


def settings(options: DatasetOptions) -> ImageSettings:
    """The image settings of the options."""
    return ImageSettings(options.random_crop, options.flip_aug, options.color_aug)


def load(path: Path, expected: Size | None = None) -> Pixels:
    """Decode a picture: upright, RGB, what is transparent laid on white.

    `expected` is the size that its placement was computed from. Raises UserError naming the file if it cannot be
    decoded or has another size.
    """
    try:
        with Image.open(path) as image:
            image.load()
            pixels = _to_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        what = f"picture {path} cannot be decoded ({error})"
        raise UserError([Mistake(what, "repair it, or take it out of the folder")]) from error
    size = (pixels.shape[1], pixels.shape[0])
    if expected is not None and size != expected:
        what = f"picture {path} is {size[0]}x{size[1]} and was {expected[0]}x{expected[1]} when the folder was read"
        raise UserError([Mistake(what, "start again, and leave the pictures as they are during a run")])
    return pixels


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):
        return _grey_16_to_rgb(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _grey_16_to_rgb(image: Image.Image) -> Pixels:
    """PIL would clip values above 255 instead of scaling them."""
    wide = np.asarray(image).astype(np.int64).clip(0, 65535)
    grey = ((wide + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")  # of a 16-bit grey PNG: one value
    if isinstance(transparent, int):
        grey[wide == transparent] = 255
    return np.repeat(grey[:, :, None], 3, axis=2)


def resize(pixels: Pixels, size: Size) -> Pixels:
    """Scale to (width, height): by area where both sides shrink or stay, else Lanczos."""
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    if size[0] <= width and size[1] <= height:
        return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def centre_offset(placement: Placement) -> tuple[int, int]:
    """Left and top of the centre crop, in pixels of the scaled picture."""
    (width, height), (bucket_width, bucket_height) = placement.resized, placement.bucket
    return (width - bucket_width) // 2, (height - bucket_height) // 2


def random_offset(placement: Placement, rng: random.Random) -> tuple[int, int]:
    """Left and top of a crop anywhere, every place equally likely."""
    (width, height), (bucket_width, bucket_height) = placement.resized, placement.bucket
    return rng.randint(0, width - bucket_width), rng.randint(0, height - bucket_height)


def fit(pixels: Pixels, placement: Placement, offset: tuple[int, int]) -> Pixels:
    """Scale to `placement.resized` and cut `placement.bucket` out at `offset` (left, top)."""
    left, top = offset
    width, height = placement.bucket
    return resize(pixels, placement.resized)[top : top + height, left : left + width]


def mirror(pixels: Pixels) -> Pixels:
    """Left to right."""
    return pixels[:, ::-1]


def vary_colour(pixels: Pixels, rng: random.Random) -> Pixels:
    """For a third of the samples: turn the hue by up to 8 of 180 steps, or a gamma of 0.95 to 1.05, equally likely."""
    if rng.random() >= _COLOUR_SHARE:
        return pixels
    if rng.random() < 0.5:
        hsv = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2HSV)
        hsv[:, :, 0] = (hsv[:, :, 0].astype(np.int16) + rng.randint(-_HUE_SHIFT, _HUE_SHIFT)) % 180
        return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), dtype=np.uint8)
    table = np.rint(255 * (np.arange(256) / 255) ** rng.uniform(*_GAMMA)).astype(np.uint8)
    return table[pixels]


def to_float(pixels: Pixels) -> NDArray[np.float32]:
    """uint8 (H, W, 3) to float32 (3, H, W) in [-1, 1]."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / np.float32(127.5) - np.float32(1)
