"""Colours are converted to sRGB by their profile. Expected values are computed from the standards of each space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from library.data import images, masks
from library.data.scan.image_headers import read_header
from library.data.scan.scan import scan
from library.sampling.init_images import read_init_image
from tests.data.image_files import dataset, noise, save, subset
from tests.data.profiles import (
    ADOBE_RGB,
    DISPLAY_P3,
    PROPHOTO,
    SRGB,
    Curve,
    Primaries,
    as_srgb,
    cmyk_profile,
    expected,
    from_srgb_curve,
    grey_profile,
    lab_as_srgb,
    rgb_profile,
    to_srgb_curve,
)

P3 = rgb_profile(DISPLAY_P3)


def stored(path: Path, image: Image.Image, profile: bytes, **keywords: Any) -> np.ndarray:
    """Write an image with a profile, and read it as training does."""
    image.save(path, icc_profile=profile, **keywords)
    return images.load(path).astype(int)


def test_red_of_srgb_in_display_p3(tmp_path: Path) -> None:
    """sRGB's red is stored as 234, 51, 35 in Display P3 (CSS Color 4, section 10.4: color(display-p3 .917 .2 .139))."""
    red = Image.new("RGB", (2, 2), (234, 51, 35))
    assert stored(tmp_path / "a.png", red, P3)[0, 0].tolist() == [255, 0, 0]
    assert read_header(tmp_path / "a.png").profile == "converted"
    assert read_init_image(tmp_path / "a.png", None, 2.0).image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("primaries", "gamma", "curve"),
    [
        (DISPLAY_P3, None, from_srgb_curve),
        (ADOBE_RGB, 563 / 256, lambda value: value ** (563 / 256)),
        (PROPHOTO, 1.8, lambda value: value**1.80078125),  # as far as u8Fixed8Number can tell
    ],
    ids=["Display P3", "Adobe RGB", "ProPhoto"],
)
def test_colours_of_larger_spaces(tmp_path: Path, primaries: Primaries, gamma: float | None, curve: Curve) -> None:
    image = noise((40, 30))
    seen = stored(tmp_path / "a.png", image, rgb_profile(primaries, gamma))
    meant = expected(np.asarray(image).astype(float), primaries, curve)
    bright = (meant > 16) & (meant < 250)  # near black and outside sRGB, eight bits leave no precision to compare
    assert np.abs(seen - meant)[bright].max() <= 2.5
    assert np.abs(np.asarray(image) - meant).max() > 50


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif", "avif"])
def test_every_format_with_profiles(tmp_path: Path, ending: str) -> None:
    if f".{ending}" not in Image.registered_extensions():
        pytest.skip(f"this Pillow has no {ending}")
    seen = stored(tmp_path / f"a.{ending}", Image.new("RGB", (64, 64), (234, 51, 35)), P3, quality=100)
    assert np.abs(seen[32, 32] - (255, 0, 0)).max() <= 6
    assert read_header(tmp_path / f"a.{ending}").profile == "converted"


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_greys(tmp_path: Path, mode: str) -> None:
    """A linear grey: 64 / 255 is 0.537 in sRGB, 137 of 255."""
    values = np.array([[0, 64, 255]], np.uint8)
    image = Image.fromarray(values.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(values)
    image = image if mode == "I;16" else image.convert(mode)
    seen = stored(tmp_path / "a.png", image, grey_profile(1.0))
    meant = np.rint(255 * to_srgb_curve(values / 255))
    assert meant[0].tolist() == [0, 137, 255]
    assert np.abs(seen - meant[:, :, None]).max() <= 1


def test_a_grey_image_with_a_profile_of_colours(tmp_path: Path) -> None:
    """Three equal channels of it: white stays white, and only the curve matters."""
    seen = stored(tmp_path / "a.png", Image.new("L", (2, 2), 64), rgb_profile(ADOBE_RGB, 1.0))
    assert np.abs(seen - 137).max() <= 1


def test_palettes_and_transparency(tmp_path: Path) -> None:
    palette = Image.new("P", (3, 1))
    palette.putpalette([234, 51, 35, 9, 9, 9, 255, 255, 255])
    palette.putdata([0, 1, 2])
    palette.save(tmp_path / "a.png", icc_profile=P3, transparency=1)
    seen = images.load(tmp_path / "a.png", background=(1, 2, 3))[0].tolist()
    assert seen == [[255, 0, 0], [1, 2, 3], [255, 255, 255]]  # the background is sRGB
    half = Image.new("RGBA", (1, 1), (234, 51, 35, 128))
    half.save(tmp_path / "b.png", icc_profile=P3)
    assert images.load(tmp_path / "b.png", background=(0, 0, 0))[0, 0].tolist() == [128, 0, 0]
    Image.new("RGB", (1, 1), (7, 8, 9)).save(tmp_path / "c.png", icc_profile=P3, transparency=(7, 8, 9))
    assert images.load(tmp_path / "c.png", background=(1, 2, 3))[0, 0].tolist() == [1, 2, 3]


def lab_of(c: int, m: int, y: int, k: int) -> tuple[float, float, float]:
    """Full black ink is black, paper is white, and full cyan is a dull blue whatever else is printed."""
    return (0.0, 0.0, 0.0) if k else (50.0, -10.0, -30.0) if c else (100.0, 0.0, 0.0)


def test_cmyk_is_converted_by_its_press(tmp_path: Path) -> None:
    inks = Image.new("CMYK", (3, 1))
    inks.putdata([(255, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 255)])
    seen = stored(tmp_path / "a.tif", inks, cmyk_profile(lab_of))[0]
    blue = lab_as_srgb((128 / 2.55, -10.0, -30.0))  # L* 50 is stored as 128 of 255
    assert np.abs(seen[0] - blue).max() <= 2 and seen[1].min() >= 254 and seen[2].max() <= 1
    assert not np.abs(np.array([0, 255, 255]) - blue).max() <= 50  # what it is without its profile
    Image.new("CMYK", (64, 64), (255, 0, 0, 0)).save(tmp_path / "a.jpg", icc_profile=cmyk_profile(lab_of), quality=100)
    assert np.abs(images.load(tmp_path / "a.jpg")[9, 9] - blue).max() <= 4


@pytest.mark.parametrize(
    "profile",
    [
        rgb_profile(SRGB),
        rgb_profile(SRGB, None),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        b"",
    ],
)
def test_srgb_changes_nothing(tmp_path: Path, profile: bytes) -> None:
    image = noise((40, 30))
    assert np.array_equal(stored(tmp_path / "a.png", image, profile), np.asarray(image))
    assert read_header(tmp_path / "a.png").profile == ""


def test_a_grey_profile_of_srgb_changes_nothing(tmp_path: Path) -> None:
    image = noise((40, 30), mode="L")
    assert np.array_equal(stored(tmp_path / "a.png", image, grey_profile(None))[:, :, 0], np.asarray(image))
    assert read_header(tmp_path / "a.png").profile == ""


@pytest.mark.parametrize(
    "profile", [b"no profile", P3[:300], P3[:128] + bytes(400), grey_profile(1.0), cmyk_profile(lab_of)]
)
def test_an_unusable_profile_counts_as_srgb(tmp_path: Path, profile: bytes) -> None:
    """Damaged, or for other pixels."""
    image = noise((40, 30))
    assert np.array_equal(stored(tmp_path / "a.png", image, profile), np.asarray(image))
    assert read_header(tmp_path / "a.png").profile == "unusable"


def test_the_scan_counts_and_remembers_them(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    for name, profile in (("a", P3), ("b", rgb_profile(PROPHOTO, 1.8)), ("c", b"no profile"), ("d", b"")):
        save(folder / f"{name}.png", caption="a", icc_profile=profile)
    first, second = (scan([dataset(subset(folder))], tmp_path / "index") for _ in range(2))
    assert first == second
    assert [record.profile for record in first.records] == ["converted", "converted", "unusable", ""]
    assert "2 images with a colour profile other than sRGB, converted to sRGB" in first.notes
    (note,) = [note for note in first.notes if "damaged" in note]
    assert note.startswith("1 image with a colour profile") and note.endswith(f"taken as sRGB: {folder / 'c.png'}")


def test_a_mask_is_no_picture(tmp_path: Path) -> None:
    """Its values are weights, whatever profile the painting program wrote."""
    mask = noise((40, 30), mode="L")
    mask.save(tmp_path / "a.png", icc_profile=grey_profile(1.0))
    assert np.array_equal(masks.load(tmp_path / "a.png", (40, 30)), np.asarray(mask))


def test_the_expected_values_know_white_and_srgb() -> None:
    """The test's own arithmetic: D50 white is white, and L* 100 too."""
    assert np.abs(as_srgb(np.array([0.9642, 1.0, 0.8249])) - 255).max() < 0.1
    assert np.abs(lab_as_srgb((100.0, 0.0, 0.0)) - 255).max() < 0.1
