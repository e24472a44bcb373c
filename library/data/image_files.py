"""Image files as Pillow reads them: which formats, how large, and which way up. PIL is imported on use.

Pillow's own limits are all set here. Its limit of pixels is replaced by one of memory, which the user may raise.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import struct
import zlib
from functools import cache
from typing import TYPE_CHECKING, BinaryIO, Literal, Protocol

if TYPE_CHECKING:
    from PIL import Image as PilImage

OPTIONAL_EXTENSIONS = {
    ".avif": "pillow (11.3 or newer)",
    ".jxl": "pillow-jxl-plugin",
    **dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif"),
}
"""Image extensions that only some installations read, and the package that reads them."""

_PLUGINS = ("pillow_avif", "pillow_jxl", "pillow_heif.HeifImagePlugin")
# Pillow only identifies them, draws them by another program, or reads one of several layers or sizes
_NOT_IMAGES = ("BUFR", "CUR", "EPS", "GRIB", "HDF5", "ICNS", "ICO", "MPEG", "PSD", "WMF")
_ORIENTATION = 0x0112  # EXIF tag
_MOST_TEXT = 256 << 20  # bytes of text in a PNG, unpacked; some programs store whole workflows with their images
_BYTES_PER_PIXEL = 4  # as Pillow keeps RGB
_GIB = 1 << 30


class ImageSource(Protocol):
    """Where an image or a mask is read from: a Path, or a member of a shard. Its text names it in messages."""

    def open(self, mode: Literal["rb"]) -> io.BufferedReader | io.BytesIO:
        """Its bytes. Raises OSError."""

    @property
    def suffix(self) -> str:
        """The extension with its point."""


class BadImage(Exception):
    """The image cannot be used; the text is the reason."""


@cache
def prepare_pillow() -> None:
    """Register Pillow's plugins and set its limits in this process. Call it before an image is opened."""
    from PIL import Image, PngImagePlugin

    for plugin in _PLUGINS:
        if importlib.util.find_spec(plugin.partition(".")[0]) is not None:
            importlib.import_module(plugin)
    Image.MAX_IMAGE_PIXELS = None  # see too_large
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = _MOST_TEXT


def too_large(size: tuple[int, int], most_memory: float) -> str | None:
    """Why an image of (width, height) is not decoded: it needs more than `most_memory` GiB. None if it does not."""
    needed = size[0] * size[1] * _BYTES_PER_PIXEL / _GIB
    if needed <= most_memory:
        return None
    what = (
        f"its {size[0]}x{size[1]} pixels need {needed:.2f} GiB of memory, more than --max_image_memory {most_memory:g}"
    )
    return f"{what}: make it smaller, or raise the limit"


@cache
def readable_extensions() -> frozenset[str]:
    """Lower-case extensions of the images that can be read here."""
    from PIL import Image

    prepare_pillow()
    known = Image.registered_extensions()  # those that Pillow only writes are not in Image.OPEN
    return frozenset(
        ending
        for ending, name in known.items()
        if (name in Image.OPEN or name == "MPO") and name not in _NOT_IMAGES  # the JPEG reader opens MPO
    )


def missing_package(path: ImageSource) -> str | None:
    """The package to install to read this image; None if no package is missing."""
    ending = path.suffix.lower()
    return OPTIONAL_EXTENSIONS.get(ending) if ending not in readable_extensions() else None


def orientation(image: PilImage.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if it is missing or damaged, as in image viewers."""
    from PIL import Image

    try:
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)  # PngImageFile.getexif would decode the image
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return 1
    return value if isinstance(value, int) else 1


def check_sums(file: BinaryIO) -> None:
    """Raise SyntaxError for a PNG whose pixel data do not match their checksums, which Pillow does not check."""
    file.seek(8)  # the signature; then chunks of length, name, data, checksum (PNG, section 5.3)
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        data, stored = file.read(length), file.read(4)
        if name == b"IDAT" and zlib.crc32(data, zlib.crc32(name)).to_bytes(4, "big") != stored:
            raise SyntaxError("its data do not match their checksum")
        if name == b"IEND":
            return
