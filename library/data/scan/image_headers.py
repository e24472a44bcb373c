"""Read the size of an image and check that its file is complete, without decoding it.

A truncated file is recognised by its end (PNG: IEND, JPEG: EOI after the scan, WebP and AVIF: the sizes in their boxes,
BMP: the pixel rows). If the end is missing, the image is decoded once: what can be decoded is not damaged. PIL is
imported on use.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from library.data.colour_profiles import ProfileUse, profile_use
from library.data.image_files import (
    BadImage,
    ImageSource,
    check_sums,
    missing_package,
    orientation,
    prepare_pillow,
    too_large,
)
from library.options.groups.dataset import DatasetOptions

if TYPE_CHECKING:
    from PIL import Image as PilImage

_TAIL = 1 << 16
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_IEND = b"IEND\xae\x42\x60\x82"  # the last chunk of a PNG: its name and checksum
_WITH_FRAMES = ("GIF", "WEBP", "PNG", "AVIF", "JXL", "TIFF")
_METADATA_CHUNKS = (b"eXIf", b"iTXt", b"zTXt", b"tEXt")  # PNG chunks that may contain EXIF


@dataclass(frozen=True)
class Header:
    """Upright size (EXIF orientation applied), whether the image may have transparency, its colour profile, and whether
    other frames or pages follow the first, which is the one that is used."""

    size: tuple[int, int]  # width, height
    transparent: bool
    profile: ProfileUse = ""
    animated: bool = False


def read_header(path: ImageSource, most_memory: float = DatasetOptions.max_image_memory) -> Header:
    """Read an image's header. Raises BadImage for an empty, truncated or unreadable file, an unknown format, and an
    image that needs more than `most_memory` GiB when decoded."""
    from PIL import Image, UnidentifiedImageError

    prepare_pillow()
    try:
        with path.open("rb") as file:
            length = file.seek(0, 2)
            if length == 0:
                raise BadImage("the file is empty (zero bytes)")
            file.seek(0)
            with Image.open(file) as image:
                if (reason := too_large(image.size, most_memory)) is not None:
                    raise BadImage(reason)
                end = _png_end(file, length) if image.format == "PNG" else None
                _check_complete(image, file, length, end)
                if image.mode == "F":
                    raise BadImage("its pixels are floating-point numbers; save it with 8 or 16 bits per channel")
                width, height = image.size
                if _orientation(image, file, end) in _TRANSPOSED:
                    width, height = height, width
                transparent, profile = bool(image.has_transparency_data), profile_use(image)
                return Header((width, height), transparent, profile, _has_frames(image))
    except UnidentifiedImageError as error:
        package = missing_package(path)
        raise BadImage(f"install {package} to read it" if package else "unknown image format") from error
    except (OSError, SyntaxError, ValueError, struct.error, EOFError) as error:
        raise BadImage(f"cannot be read ({error})") from error


def _orientation(image: PilImage.Image, file: BinaryIO, png_end: int | None) -> int:
    """The EXIF orientation, 1 if there is none. A PNG may store it after its pixels, where Pillow finds it only by
    decoding, so a PNG is decoded if it has such a chunk."""
    if png_end is not None and any(name in _tail(file, png_end) for name in _METADATA_CHUNKS):
        image.load()
    return orientation(image)


def _has_frames(image: PilImage.Image) -> bool:
    """Whether other frames or pages follow; the second picture of a phone's JPEG and layers are none."""
    return image.format in _WITH_FRAMES and bool(getattr(image, "is_animated", False))


def _check_complete(image: PilImage.Image, file: BinaryIO, length: int, png_end: int | None) -> None:
    """Raise BadImage for a truncated or damaged image. Decodes it if its end does not show that it is complete."""
    position = file.tell()
    complete = png_end is not None or _check_end(image, file, length, position)
    if not complete:
        try:
            if image.format == "PNG":
                check_sums(file)
            file.seek(position)
            image.load()
        except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
            reason = f"cannot be decoded ({error})" if complete is None else "the file is truncated"
            raise BadImage(reason) from error
    file.seek(position)


def _check_end(image: PilImage.Image, file: BinaryIO, length: int, position: int) -> bool | None:
    """True: complete, False: probably truncated, None: inconclusive. `position` is where Pillow stopped reading."""
    match image.format:
        case "PNG":
            return False
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


def _png_end(file: BinaryIO, length: int) -> int | None:
    """Where a PNG ends: at the end of the file, or earlier if many other bytes follow. None if IEND is missing."""
    if _IEND in _tail(file, length):
        return length
    before = file.tell()
    position: int = 8
    try:
        while position + 12 <= length:  # chunks of length, name, data, checksum (PNG, section 5.3)
            file.seek(position)
            size, name = struct.unpack(">I4s", file.read(8))
            position += 12 + int(size)
            if name == b"IEND":
                return position
        return None
    finally:
        file.seek(before)


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
