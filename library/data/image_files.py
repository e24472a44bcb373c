"""Image files as Pillow reads them: which formats, and which way up. PIL is imported on use."""

from __future__ import annotations

import importlib
import importlib.util
import struct
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

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


@cache
def readable_extensions() -> frozenset[str]:
    """Lower-case extensions of the images that can be read here. Registers Pillow's plugins in this process."""
    from PIL import Image

    for plugin in _PLUGINS:
        if importlib.util.find_spec(plugin.partition(".")[0]) is not None:
            importlib.import_module(plugin)
    known = Image.registered_extensions()  # those that Pillow only writes are not in Image.OPEN
    return frozenset(
        ending
        for ending, name in known.items()
        if (name in Image.OPEN or name == "MPO") and name not in _NOT_IMAGES  # the JPEG reader opens MPO
    )


def missing_package(path: Path) -> str | None:
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
