"""Read an image file into the pixels of a sample: resize, crop, flip and colour augmentation as in kohya's sd-scripts.

A Geometry is decided once per sample and applied to the image and its mask alike. Arrays are uint8 (H, W, 3) RGB until
the last step. All randomness comes from the generators passed in.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image

from library.data.buckets import Placement
from library.data.decoding import WHITE, Colour, decode, to_rgb
from library.data.image_files import ImageSource
from library.options.datasets import ImageSettings, Size
from library.options.mistakes import Mistake, UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

_BY_PIL = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}
_BY_OPENCV = {
    "nearest": cv2.INTER_NEAREST,
    "bilinear": cv2.INTER_LINEAR,
    "linear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "cubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
}
_FACE = re.compile(r".*_(\d+)_(\d+)_(\d+)_(\d+)", re.ASCII | re.DOTALL)
_FACE_JITTER = 1 / 20  # of the face's size
_COLOUR_SHARE = 0.33
_HUE_SHIFT = 8  # OpenCV hue: 180 steps to the circle
_GAMMA = (0.95, 1.05)


@dataclass(frozen=True)
class Geometry:
    """Resize, crop and flip of a sample: scale to `resized`, crop `bucket` at `offset` (left, top), then mirror if
    `flipped`. `interpolation` as in ImageSettings."""

    resized: Size
    offset: tuple[int, int]
    bucket: Size
    flipped: bool = False
    interpolation: str | None = None


def load(path: ImageSource, expected: Size | None = None, background: Colour = WHITE) -> Pixels:
    """Decode an image to upright RGB; the first frame of an animation; transparency on `background`.

    `expected` is the size at the scan. Raises UserError naming the file if it cannot be decoded or has another size.
    """
    pixels = np.asarray(decode(path, lambda image: to_rgb(image, background)))
    size = (pixels.shape[1], pixels.shape[0])
    if expected is not None and size != expected:
        raise size_changed(path, size, expected)
    return pixels


def size_changed(path: ImageSource, size: Size, expected: Size) -> UserError:
    """The error for an image whose size has changed since the scan."""
    what = f"image {path} is {size[0]}x{size[1]} and was {expected[0]}x{expected[1]} when the folder was read"
    return UserError([Mistake(what, "start again, and do not change images during a run")])


def resize(pixels: Pixels, size: Size, interpolation: str | None = None) -> Pixels:
    """Scale (H, W) or (H, W, 3) to (width, height), unless it already has that size.

    Default `interpolation`: area if no side grows, else Lanczos. Raises ValueError for an unknown name.
    """
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    if interpolation is None:
        interpolation = "area" if size[0] <= width and size[1] <= height else "lanczos"
    if interpolation in _BY_PIL:
        return np.asarray(Image.fromarray(pixels).resize(size, _BY_PIL[interpolation]))
    if interpolation not in _BY_OPENCV:
        raise ValueError(f"unknown interpolation {interpolation!r}")
    return np.asarray(cv2.resize(pixels, size, interpolation=_BY_OPENCV[interpolation]), dtype=np.uint8)


def decide_geometry(
    placement: Placement,
    settings: ImageSettings,
    name: str,
    size: Size,
    crop_rng: random.Random | None = None,
    flip_rng: random.Random | None = None,
) -> Geometry:
    """Decide resize, crop and flip of a sample of the image file `name` of `size` (upright).

    Without a generator, its random choice is skipped: the crop is at the centre (or the corner, if set), and nothing is
    flipped. A face crop applies only if the file name has the face's position. In kohya's files it applies only without
    buckets, so callers must unset it with buckets.
    """
    resized = placement.resized
    if settings.face_crop is not None and crop_rng is not None and (face := _face_of(name)) is not None:
        resized, offset = _around_face(face, settings, size, placement.bucket, crop_rng)
    elif settings.random_crop and crop_rng is not None:
        offset = random_offset(placement, crop_rng)
    else:
        offset = (0, 0) if settings.corner_crop else centre_offset(placement)
    flipped = settings.flip and flip_rng is not None and flip_rng.random() < 0.5
    return Geometry(resized, offset, placement.bucket, flipped, settings.interpolation)


def centre_offset(placement: Placement) -> tuple[int, int]:
    """Left and top of the centre crop, in pixels of the resized image."""
    (width, height), (bucket_width, bucket_height) = placement.resized, placement.bucket
    return (width - bucket_width) // 2, (height - bucket_height) // 2


def random_offset(placement: Placement, rng: random.Random) -> tuple[int, int]:
    """Left and top of a uniformly random crop."""
    (width, height), (bucket_width, bucket_height) = placement.resized, placement.bucket
    return rng.randint(0, width - bucket_width), rng.randint(0, height - bucket_height)


def _face_of(name: str) -> tuple[int, int, int, int] | None:
    """Centre x, y, width and height of the face, from a file name such as stem_cx_cy_w_h.png."""
    match = _FACE.fullmatch(PurePosixPath(name).stem)
    if match is None:
        return None
    x, y, width, height = (int(part) for part in match.groups())
    return (x, y, width, height) if x > 0 and max(width, height) > 0 else None


def _around_face(
    face: tuple[int, int, int, int], settings: ImageSettings, size: Size, bucket: Size, rng: random.Random
) -> tuple[Size, tuple[int, int]]:
    """Resized size and offset of a crop around a face.

    The scale is drawn so that the shorter side of the crop is a multiple, within the range, of the face size. It never
    upscales, unless needed to cover the crop. The face is in the centre, give or take a small jitter; with a random
    crop at any distance, small ones more likely.
    """
    x, y, *sides = face
    fewest, most = sorted(settings.face_crop or (1.0, 1.0))
    cover = max(bucket[0] / size[0], bucket[1] / size[1])
    smallest = max(cover, min(1.0, min(bucket) / (max(sides) * most)))
    largest = max(smallest, min(1.0, min(bucket) / (max(sides) * fewest)))
    scale = rng.uniform(smallest, largest)
    resized = (max(bucket[0], int(size[0] * scale + 0.5)), max(bucket[1], int(size[1] * scale + 0.5)))
    jitter = int(max(sides) * scale * _FACE_JITTER) if fewest < most else 0
    offset = []
    for centre, length, target in zip((x, y), resized, bucket, strict=True):
        middle = int(centre * scale + 0.5)
        reach = max(length - middle, middle)
        moved = rng.randint(0, reach) + rng.randint(-reach, 0) if settings.random_crop else rng.randint(-jitter, jitter)
        offset.append(max(0, min(middle - target // 2 + moved, length - target)))
    return resized, (offset[0], offset[1])


def crop_ltrb(geometry: Geometry) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the crop in pixels of the resized image, which is mirrored if the sample is.

    Left and top are the crop conditioning of Stable Diffusion XL.
    """
    (left, top), (width, height) = geometry.offset, geometry.bucket
    if geometry.flipped:
        left = geometry.resized[0] - (left + width)
    return left, top, left + width, top + height


def apply(pixels: Pixels, geometry: Geometry) -> Pixels:
    """Resize, crop and flip an image to (H, W, 3) of the bucket's size. For masks use masks.apply."""
    (left, top), (width, height) = geometry.offset, geometry.bucket
    crop = resize(pixels, geometry.resized, geometry.interpolation)[top : top + height, left : left + width]
    return mirror(crop) if geometry.flipped else crop


def mirror(pixels: Pixels) -> Pixels:
    """Flip left to right."""
    return pixels[:, ::-1]


def vary_colour(pixels: Pixels, rng: random.Random) -> Pixels:
    """Colour augmentation for a third of the samples: shift the hue by up to 8 of 180 steps, or apply a gamma of 0.95
    to 1.05, equally likely."""
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
