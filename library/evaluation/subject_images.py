"""The real images of a subject, and crops to the subject by masks. PIL is imported on use."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from library.data.image_files import ImageSource, readable_extensions
from library.options.mistakes import Mistake, Mistakes, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

MASK_IS_SET = 128
"""Brightness of a mask from which a pixel belongs to the subject."""


def list_images(folder: Path, flag: str, mistakes: Mistakes) -> list[Path]:
    """All images in a folder and its sub-folders, sorted. Adds a mistake if there are none."""
    if not folder.is_dir():
        mistakes.add(f"{flag} {folder} is not a folder", "give the folder of the subject's images")
        return []
    try:
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in readable_extensions())
    except OSError as error:
        mistakes.add(f"{flag} {folder} cannot be read ({error.strerror or error})", "check its permissions")
        return []
    if not found:
        mistakes.add(f"{flag} {folder} contains no images", "give the folder of the subject's images")
    return found


def open_image(path: ImageSource, mask: Path | None = None, most_memory: float = math.inf) -> Image:
    """An image upright in sRGB, transparency on white; cropped to the box of its mask if there is one. Raises
    UserError."""
    from library.data.decoding import luminance, read, to_rgb
    from library.data.image_files import BadImage

    try:
        image = read(path, to_rgb, most_memory)
        return image if mask is None else _cropped(image, read(mask, luminance, most_memory), mask)
    except BadImage as error:
        raise UserError([Mistake(f"{path} cannot be read ({error})", "repair or remove it")]) from error


def mask_of(image: Path, images: Path, masks: Path | None) -> Path | None:
    """The mask of an image in a folder: the PNG of its name at the same place in the folder of masks. None if there is
    none."""
    if masks is None:
        return None
    place = masks / image.relative_to(images)
    return next((path for path in _names(place) if path.is_file()), None)


def _names(place: Path) -> Iterator[Path]:
    yield place.with_suffix(".png")
    yield place.with_name(f"{place.name}.png")  # of a.png beside a.jpg


def _cropped(image: Image, mask: Image, path: Path) -> Image:
    if mask.size != image.size:
        mask = mask.resize(image.size)
    box = mask.point(lambda value: 255 if value >= MASK_IS_SET else 0).getbbox()
    if box is None:
        raise UserError([Mistake(f"the mask {path} marks nothing", "mend it, or remove it to use the whole image")])
    return image.crop(box)
