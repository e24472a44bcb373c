"""Convert images to sRGB by their ICC colour profile, as image viewers do. The conversion is LittleCMS's, in Pillow.

The intent is relative colorimetric with black point compensation: colours that sRGB has stay exact, and black stays
black. PIL is imported on use.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL import Image as PilImage

ProfileUse = Literal["", "converted", "unusable"]
"""What becomes of an image's colour profile: "" for none or sRGB, which changes nothing; unusable if it is damaged or
made for other pixels, such as CMYK for RGB: then the image is taken as sRGB."""

_MOST_DIFFERENCE = 2  # of 255: variants of sRGB differ by no more
_PIXELS_OF = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of a profile -> mode that it is applied to


class _Unusable(Exception):
    """The profile cannot be used for these pixels."""


def profile_use(image: PilImage.Image) -> ProfileUse:
    """How `to_srgb` treats the profile of an image, which need not be decoded."""
    profile = image.info.get("icc_profile")
    if not profile:
        return ""
    try:
        return "" if _transform(profile, _pixels(image.mode)) is None else "converted"
    except _Unusable:
        return "unusable"


def to_srgb(image: PilImage.Image) -> PilImage.Image:
    """Convert a decoded image to RGB or RGBA by its profile. Returns it unchanged if there is nothing to convert."""
    profile = image.info.get("icc_profile")
    try:
        found = _transform(profile, _pixels(image.mode)) if profile else None
    except _Unusable:
        return image
    if found is None:
        return image
    mode, transform = found
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    converted: PilImage.Image = transform.apply(image if image.mode == mode else image.convert(mode))
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _pixels(mode: str) -> str:
    """RGB, L or CMYK: what the pixels of an image mode are, without transparency and palette."""
    if mode in ("1", "L", "LA", "La") or mode.startswith("I"):
        return "L"
    return mode if mode in ("CMYK", "LAB") else "RGB"


@lru_cache(maxsize=16)
def _transform(profile: bytes, pixels: str) -> tuple[str, Any] | None:
    """The mode to which the transform to sRGB is applied, and the transform; None if the profile is sRGB.

    Raises _Unusable. A grey image may have a profile of RGB, which viewers apply to three equal channels.
    """
    from PIL import ImageChops, ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _PIXELS_OF.get(source.profile.xcolor_space.strip(), "")
        if mode != pixels and (mode, pixels) != ("RGB", "L"):
            raise _Unusable
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            # threads share it, so it must not keep the last pixel
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE,
        )
    except (OSError, ImageCms.PyCMSError) as error:
        raise _Unusable from error
    if mode != "CMYK":
        samples = _samples(mode)
        differences = ImageChops.difference(transform.apply(samples), samples.convert("RGB"))
        if max(differences.tobytes()) <= _MOST_DIFFERENCE:
            return None
    return mode, transform


def _samples(mode: str) -> PilImage.Image:
    """All greys, or colours spread evenly over RGB."""
    from PIL import Image

    if mode == "L":
        return Image.frombytes("L", (256, 1), bytes(range(256)))
    steps = range(0, 256, 17)
    colours = bytes(value for red in steps for green in steps for blue in steps for value in (red, green, blue))
    return Image.frombytes("RGB", (len(colours) // 3, 1), colours)
