"""From an image file to the pixels of one sample; resizing, cropping and variation as in kohya's sd-scripts.

PIL decodes (OpenCV drops transparency and cannot open names outside ASCII on Windows). What part of an image a sample
shows is decided once, as a Geometry, and then done to the image and to its mask alike. Arrays are uint8 (H, W, 3)
RGB until the last step. All chance comes from the generators that are passed in.
"""

from __future__ import annotations

import random
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from library.data.buckets import Placement
from library.data.scan.image_headers import missing_package, orientation, readable_extensions
from library.options.datasets import ImageSettings, Size
from library.options.mistakes import Mistake, UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

Colour = tuple[int, int, int]  # RGB

_WHITE = (255, 255, 255)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
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
    """What a sample shows: the image is scaled to `resized`, `bucket` is cut out at `offset` (left, top), and that
    is mirrored if `flipped`. `interpolation` as in ImageSettings."""

    resized: Size
    offset: tuple[int, int]
    bucket: Size
    flipped: bool = False
    interpolation: str | None = None


def load(path: Path, expected: Size | None = None, background: Colour = _WHITE) -> Pixels:
    """Decode an image: upright, RGB, of a film the first frame, what is transparent laid on `background`.

    `expected` is the size that its placement was computed from. Raises UserError naming the file if it cannot be
    decoded or has another size.
    """
    pixels = decode(path, lambda image: to_rgb(image, background))
    size = (pixels.shape[1], pixels.shape[0])
    if expected is not None and size != expected:
        raise changed(path, size, expected)
    return pixels


def changed(path: Path, size: Size, expected: Size) -> UserError:
    """The error of an image that has not the size it had."""
    what = f"image {path} is {size[0]}x{size[1]} and was {expected[0]}x{expected[1]} when the folder was read"
    return UserError([Mistake(what, "start again, and leave the images as they are during a run")])


def decode(path: Path, read: Callable[[Image.Image], Pixels], kind: str = "image") -> Pixels:
    """What `read` makes of the upright image. Raises UserError, which calls it a `kind`, if it cannot be decoded."""
    readable_extensions()  # in a worker process Pillow's plugins are not there yet
    try:
        with Image.open(path) as image:
            _scale_transparent_value(image)
            if image.format == "PNG":
                _check_sums(path)
            image.load()
            turn = _UPRIGHT.get(orientation(image))
            return read(image if turn is None else image.transpose(turn))
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        remedy = "repair it, or take it out of the folder"
        if isinstance(error, UnidentifiedImageError) and (package := missing_package(path)) is not None:
            remedy = f"reading it needs {package}: install that, or take the {kind} out of the folder"
        raise UserError([Mistake(f"{kind} {path} cannot be decoded ({error})", remedy)]) from error


def _check_sums(path: Path) -> None:
    """Raise SyntaxError for a PNG whose pixel data do not fit their checksums, which Pillow does not compare."""
    with path.open("rb") as file:
        file.seek(8)  # the signature; then chunks of length, name, data, checksum (PNG, section 5.3)
        while len(head := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", head)
            data, stored = file.read(length), file.read(4)
            if name == b"IDAT" and zlib.crc32(data, zlib.crc32(name)).to_bytes(4, "big") != stored:
                raise SyntaxError("its data do not fit their checksum")
            if name == b"IEND":
                return


def _scale_transparent_value(image: Image.Image) -> None:
    """PIL compares the one transparent value of a PNG, as wide as in the file, with pixels that it made 8 bits wide."""
    value, tiles = image.info.get("transparency"), getattr(image, "tile", [])
    stored = tiles[0][3] if image.format == "PNG" and tiles else ""
    if isinstance(value, int) and stored in ("L;2", "L;4"):
        image.info["transparency"] = value * (85 if stored == "L;2" else 17)
    elif isinstance(value, tuple) and stored == "RGB;16B":
        image.info["transparency"] = tuple(part >> 8 for part in value)


def to_rgb(image: Image.Image, background: Colour) -> Pixels:
    """The colours of a decoded image of any mode, (H, W, 3), what is transparent laid on `background`."""
    if image.mode.startswith("I"):
        return _grey_16_to_rgb(image, background)
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _grey_16_to_rgb(image: Image.Image, background: Colour) -> Pixels:
    """PIL would clip values above 255 instead of scaling them."""
    wide = np.asarray(image).astype(np.int64).clip(0, 65535)
    pixels = np.repeat(((wide + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    transparent = image.info.get("transparency")  # of a 16-bit grey PNG: one value
    if isinstance(transparent, int):
        pixels[wide == transparent] = background
    return pixels


def resize(pixels: Pixels, size: Size, interpolation: str | None = None) -> Pixels:
    """Scale (H, W) or (H, W, 3) to (width, height); what has that size already is left as it is.

    Without `interpolation`: by area where both sides shrink or stay, else Lanczos. Raises ValueError for other names.
    """
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    if interpolation is None:
        interpolation = "area" if size[0] <= width and size[1] <= height else "lanczos"
    if interpolation in _BY_PIL:
        return np.asarray(Image.fromarray(pixels).resize(size, _BY_PIL[interpolation]))
    if interpolation not in _BY_OPENCV:
        raise ValueError(f"no interpolation is called {interpolation!r}")
    return np.asarray(cv2.resize(pixels, size, interpolation=_BY_OPENCV[interpolation]), dtype=np.uint8)


def geometry(
    placement: Placement,
    chosen: ImageSettings,
    name: str,
    size: Size,
    crop_rng: random.Random | None = None,
    flip_rng: random.Random | None = None,
) -> Geometry:
    """Decide what a sample of the image `name` (its file's name) of `size` (upright) shows.

    Without a generator nothing is left to that chance: the crop is the centre or, if so chosen, the corner; nothing is
    mirrored. A face crop moves and scales the crop within the image only where the name tells of a face; in kohya's
    files it counts without buckets only, so whoever reads the settings leaves it out where there are buckets.
    """
    resized = placement.resized
    if chosen.face_crop is not None and crop_rng is not None and (face := _face_of(name)) is not None:
        resized, offset = _around_face(face, chosen, size, placement.bucket, crop_rng)
    elif chosen.random_crop and crop_rng is not None:
        offset = random_offset(placement, crop_rng)
    else:
        offset = (0, 0) if chosen.corner_crop else centre_offset(placement)
    flipped = chosen.flip and flip_rng is not None and flip_rng.random() < 0.5
    return Geometry(resized, offset, placement.bucket, flipped, chosen.interpolation)


def centre_offset(placement: Placement) -> tuple[int, int]:
    """Left and top of the centre crop, in pixels of the scaled image."""
    (width, height), (bucket_width, bucket_height) = placement.resized, placement.bucket
    return (width - bucket_width) // 2, (height - bucket_height) // 2


def random_offset(placement: Placement, rng: random.Random) -> tuple[int, int]:
    """Left and top of a crop anywhere, every place equally likely."""
    (width, height), (bucket_width, bucket_height) = placement.resized, placement.bucket
    return rng.randint(0, width - bucket_width), rng.randint(0, height - bucket_height)


def _face_of(name: str) -> tuple[int, int, int, int] | None:
    """Centre x, y, width and height of the face, if the file's name ends with them: stem_cx_cy_w_h.png."""
    match = _FACE.fullmatch(PurePosixPath(name).stem)
    if match is None:
        return None
    x, y, width, height = (int(part) for part in match.groups())
    return (x, y, width, height) if x > 0 and max(width, height) > 0 else None


def _around_face(
    face: tuple[int, int, int, int], chosen: ImageSettings, size: Size, bucket: Size, rng: random.Random
) -> tuple[Size, tuple[int, int]]:
    """Scaled size and offset of a crop around a face.

    The scale is drawn so that the shorter side of the crop holds as many face sizes as the range says, but never
    enlarges, unless the image would not cover the crop. The face is in the middle, or off it by a little; with a
    random crop by any distance, small ones more likely.
    """
    x, y, *sides = face
    fewest, most = sorted(chosen.face_crop or (1.0, 1.0))
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
        moved = rng.randint(0, reach) + rng.randint(-reach, 0) if chosen.random_crop else rng.randint(-jitter, jitter)
        offset.append(max(0, min(middle - target // 2 + moved, length - target)))
    return resized, (offset[0], offset[1])


def crop_ltrb(shown: Geometry) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the crop in pixels of the scaled image, which is mirrored if the sample is.

    Left and top are what Stable Diffusion XL is told, beside the image's size as it was and the bucket.
    """
    (left, top), (width, height) = shown.offset, shown.bucket
    if shown.flipped:
        left = shown.resized[0] - (left + width)
    return left, top, left + width, top + height


def apply(pixels: Pixels, shown: Geometry) -> Pixels:
    """The part that a sample shows, (H, W, 3) of the bucket's size, from a whole image. Masks have masks.apply."""
    (left, top), (width, height) = shown.offset, shown.bucket
    cut = resize(pixels, shown.resized, shown.interpolation)[top : top + height, left : left + width]
    return mirror(cut) if shown.flipped else cut


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
