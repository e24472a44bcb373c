"""Read the size of an image and check that its file is complete, without decoding it.

A truncated file is recognised by its end (PNG: IEND, JPEG: EOI after the scan, WebP and AVIF: the sizes in their boxes,
BMP: the pixel rows). If that is inconclusive, the image is decoded once. PIL is imported on use.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from library.data.image_files import missing_package, orientation, readable_extensions

if TYPE_CHECKING:
    from PIL import Image as PilImage

_TAIL = 1 << 16
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_METADATA_CHUNKS = (b"eXIf", b"iTXt", b"zTXt", b"tEXt")  # PNG chunks that may contain EXIF


class BadImage(Exception):
    """The image cannot be used; the text is the reason."""


@dataclass(frozen=True)
class Header:
    """Upright size (EXIF orientation applied), and whether the image may have transparency."""

    size: tuple[int, int]  # width, height
    transparent: bool


def read_header(path: Path) -> Header:
    """Read an image's header. Raises BadImage for an empty, truncated or unreadable file or an unknown format."""
    from PIL import Image, UnidentifiedImageError

    readable_extensions()
    try:
        with path.open("rb") as file:
            length = file.seek(0, 2)
            if length == 0:
                raise BadImage("the file is empty (zero bytes)")
            file.seek(0)
            with Image.open(file) as image:
                if not _is_complete(image, file, length):
                    raise BadImage("the file is truncated")
                if image.mode == "F":
                    raise BadImage("its pixels are floating-point numbers; save it with 8 or 16 bits per channel")
                width, height = image.size
                if _orientation(image, file, length) in _TRANSPOSED:
                    width, height = height, width
                return Header((width, height), bool(image.has_transparency_data))
    except Image.DecompressionBombError as error:
        raise BadImage("it has more pixels than Pillow decodes") from error
    except UnidentifiedImageError as error:
        package = missing_package(path)
        raise BadImage(f"install {package} to read it" if package else "unknown image format") from error
    except (OSError, SyntaxError, ValueError, struct.error, EOFError) as error:
        raise BadImage(f"cannot be read ({error})") from error


def _orientation(image: PilImage.Image, file: BinaryIO, length: int) -> int:
    """The EXIF orientation, 1 if there is none. A PNG may store it after its pixels, where Pillow finds it only by
    decoding, so a PNG is decoded if it has such a chunk."""
    if image.format == "PNG" and any(name in _tail(file, length) for name in _METADATA_CHUNKS):
        image.load()
    return orientation(image)


def _is_complete(image: PilImage.Image, file: BinaryIO, length: int) -> bool:
    position = file.tell()
    complete = _check_end(image, file, length, position)
    file.seek(position)
    if complete is None:
        try:
            image.load()
        except (OSError, SyntaxError, ValueError, struct.error) as error:
            raise BadImage(f"cannot be decoded ({error})") from error
        return True
    return complete


def _check_end(image: PilImage.Image, file: BinaryIO, length: int, position: int) -> bool | None:
    """True: complete, False: truncated, None: inconclusive. `position` is where Pillow stopped reading."""
    match image.format:
        case "PNG":
            return b"IEND\xae\x42\x60\x82" in _tail(file, length)
        case "JPEG" | "MPO":
            # an EOI before `position` ends the thumbnail; without a later one, a video may follow the image
            end = _tail(file, length).rfind(b"\xff\xd9")
            return True if end >= 0 and max(0, length - _TAIL) + end >= position else None
        case "WEBP":
            file.seek(4)
            (size,) = struct.unpack("<I", file.read(4))
            return bool(size + 8 <= length)
        case "BMP":
            return _bmp_is_complete(file, length)
        case "AVIF":
            return _boxes_are_complete(file, length)
        case _:
            return None


def _tail(file: BinaryIO, length: int) -> bytes:
    position = file.tell()
    file.seek(max(0, length - _TAIL))
    tail = file.read(_TAIL)
    file.seek(position)
    return tail


def _bmp_is_complete(file: BinaryIO, length: int) -> bool | None:
    """Pixel rows are padded to 4 bytes; the file size in the header is often wrong and is not used."""
    file.seek(0)
    head = file.read(34)
    if len(head) < 34:
        return False
    offset, header_size = struct.unpack_from("<II", head, 10)
    width, height, _, depth, compression = struct.unpack_from("<iiHHI", head, 18)
    if header_size < 40 or compression not in (0, 3):
        return None
    return bool(offset + (width * depth + 31) // 32 * 4 * abs(height) <= length)


def _boxes_are_complete(file: BinaryIO, length: int) -> bool | None:
    """ISO base media: boxes of (size, name) fill the file; size 1: 64 bits follow, size 0: up to the end."""
    position = 0
    while position + 8 <= length:
        file.seek(position)
        head = file.read(16)
        size = struct.unpack_from(">I", head)[0]
        if size == 1 and len(head) == 16:
            size = struct.unpack_from(">Q", head, 8)[0]
        if size < 8:
            return None
        position += size
    return position <= length
