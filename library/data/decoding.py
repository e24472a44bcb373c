"""Decode an image file: upright, in sRGB on a background, or as a mask by its brightness or its opacity.

Decodes with PIL: OpenCV drops transparency and cannot open non-ASCII names on Windows.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

from library.data.colour_profiles import to_srgb
from library.data.image_files import (
    BadImage,
    ImageSource,
    check_sums,
    missing_package,
    orientation,
    prepare_pillow,
    too_large,
)
from library.data.shards.member import Member
from library.options.mistakes import Mistake, UserError

Colour = tuple[int, int, int]  # RGB
Result = TypeVar("Result")

WHITE = (255, 255, 255)
_BLACK = (0, 0, 0)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(path: ImageSource, convert: Callable[[Image.Image], Result], kind: str = "image") -> Result:
    """`read` for an image that the scan has found. Raises UserError, which calls the file a `kind`."""
    try:
        return read(path, convert)
    except BadImage as error:
        remedy = "repair it, or remove it from the folder"
        if isinstance(path, Member):
            remedy = "restore the shard, or make its table again: tools/make_shards.py"
        if isinstance(error.__cause__, UnidentifiedImageError) and (package := missing_package(path)) is not None:
            remedy = f"install {package} to read it, or remove the {kind} from the folder"
        raise UserError([Mistake(f"{kind} {path} cannot be decoded ({error})", remedy)]) from error


def read(path: ImageSource, convert: Callable[[Image.Image], Result], most_memory: float = math.inf) -> Result:
    """Open an image upright and apply `convert`. `most_memory`: GiB that it may need when decoded. Raises BadImage."""
    prepare_pillow()
    try:
        with path.open("rb") as file, Image.open(file) as image:
            if (reason := too_large(image.size, most_memory)) is not None:
                raise BadImage(reason)
            _scale_transparent_value(image)
            if image.format == "PNG":
                position = file.tell()
                check_sums(file)
                file.seek(position)
            image.load()
            turn = _UPRIGHT.get(orientation(image))
            return convert(image if turn is None else image.transpose(turn))
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        # of the operating system's errors without the path, which the message has
        reason = error.strerror if isinstance(error, OSError) else None
        raise BadImage(reason or str(error)) from error


def to_rgb(image: Image.Image, background: Colour = WHITE) -> Image.Image:
    """Convert a decoded image of any mode to sRGB by its colour profile, with transparency on `background`."""
    return _opaque(to_srgb(_eight_bits(image)), background)


def luminance(image: Image.Image) -> Image.Image:
    """Convert a decoded mask of any mode to L: its luminance (ITU-R BT.601), 0 where it is transparent.

    Its colour profile is ignored, because its values are weights.
    """
    image = _eight_bits(image)
    return image if image.mode == "L" and not image.has_transparency_data else _opaque(image, _BLACK).convert("L")


def opacity(image: Image.Image) -> Image.Image:
    """The opacity of a decoded image of any mode, as L: 255 = opaque."""
    image = _eight_bits(image)
    if not image.has_transparency_data:
        return Image.new("L", image.size, 255)
    return image.convert("RGBA").getchannel("A")


def _opaque(image: Image.Image, background: Colour) -> Image.Image:
    """RGB with transparency on `background`."""
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")  # the largest images are not copied needlessly


def _scale_transparent_value(image: Image.Image) -> None:
    """Convert a PNG's transparent value to 8 bits: PIL compares it unscaled with pixels that it has converted."""
    value, tiles = image.info.get("transparency"), getattr(image, "tile", [])
    stored = tiles[0][3] if image.format == "PNG" and tiles else ""
    if isinstance(value, int) and stored in ("L;2", "L;4"):
        image.info["transparency"] = value * (85 if stored == "L;2" else 17)
    elif isinstance(value, tuple) and stored == "RGB;16B":
        image.info["transparency"] = tuple(part >> 8 for part in value)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits, as L or LA: PIL would clip values above 255. Returns other images unchanged."""
    if not image.mode.startswith("I"):
        return image
    import numpy as np  # only for these; the plan decodes masks

    wide = np.asarray(image).astype(np.int64).clip(0, 65535)
    grey = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    grey.info["icc_profile"] = image.info.get("icc_profile")
    transparent = image.info.get("transparency")  # of a 16-bit grey PNG: one value
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(wide == transparent, 0, 255).astype(np.uint8)))
    return grey
