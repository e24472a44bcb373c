"""Decode an image file: upright, in RGB on a background, or as a mask by its brightness or its opacity.

Decodes with PIL (OpenCV drops transparency and cannot open non-ASCII names on Windows). PIL and numpy are imported on
use, because the plan decodes masks.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from library.data.image_files import missing_package, orientation, readable_extensions
from library.options.mistakes import Mistake, UserError

if TYPE_CHECKING:
    from PIL import Image as PilImage

Colour = tuple[int, int, int]  # RGB
Result = TypeVar("Result")

WHITE = (255, 255, 255)


def decode(path: Path, read: Callable[[PilImage.Image], Result], kind: str = "image") -> Result:
    """Open an image upright and apply `read`. Raises UserError, which calls the file a `kind`, if that fails."""
    from PIL import Image, UnidentifiedImageError

    readable_extensions()  # registers Pillow's plugins in a worker process
    try:
        with Image.open(path) as image:
            _scale_transparent_value(image)
            if image.format == "PNG":
                _check_sums(path)
            image.load()
            return read(_upright(image))
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        remedy = "repair it, or remove it from the folder"
        if isinstance(error, UnidentifiedImageError) and (package := missing_package(path)) is not None:
            remedy = f"install {package} to read it, or remove the {kind} from the folder"
        raise UserError([Mistake(f"{kind} {path} cannot be decoded ({error})", remedy)]) from error


def to_rgb(image: PilImage.Image, background: Colour = WHITE) -> PilImage.Image:
    """Convert a decoded image of any mode to RGB, with transparency on `background`."""
    from PIL import Image

    image = _eight_bits(image)
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return image.convert("RGB")


def opacity(image: PilImage.Image) -> PilImage.Image:
    """The opacity of a decoded image of any mode, as L: 255 = opaque."""
    from PIL import Image

    image = _eight_bits(image)
    if not image.has_transparency_data:
        return Image.new("L", image.size, 255)
    return image.convert("RGBA").getchannel("A")


def _upright(image: PilImage.Image) -> PilImage.Image:
    """The image turned as its EXIF orientation says."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def _check_sums(path: Path) -> None:
    """Raise SyntaxError for a PNG whose pixel data do not match their checksums, which Pillow does not check."""
    with path.open("rb") as file:
        file.seek(8)  # the signature; then chunks of length, name, data, checksum (PNG, section 5.3)
        while len(head := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", head)
            data, stored = file.read(length), file.read(4)
            if name == b"IDAT" and zlib.crc32(data, zlib.crc32(name)).to_bytes(4, "big") != stored:
                raise SyntaxError("its data do not match their checksum")
            if name == b"IEND":
                return


def _scale_transparent_value(image: PilImage.Image) -> None:
    """Convert a PNG's transparent value to 8 bits: PIL compares it unscaled with pixels that it has converted."""
    value, tiles = image.info.get("transparency"), getattr(image, "tile", [])
    stored = tiles[0][3] if image.format == "PNG" and tiles else ""
    if isinstance(value, int) and stored in ("L;2", "L;4"):
        image.info["transparency"] = value * (85 if stored == "L;2" else 17)
    elif isinstance(value, tuple) and stored == "RGB;16B":
        image.info["transparency"] = tuple(part >> 8 for part in value)


def _eight_bits(image: PilImage.Image) -> PilImage.Image:
    """Scale 16-bit grey to 8 bits, as L or LA: PIL would clip values above 255. Returns other images unchanged."""
    if not image.mode.startswith("I"):
        return image
    import numpy as np
    from PIL import Image

    wide = np.asarray(image).astype(np.int64).clip(0, 65535)
    grey = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")  # of a 16-bit grey PNG: one value
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(wide == transparent, 0, 255).astype(np.uint8)))
    return grey
