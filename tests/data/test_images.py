"""Pixels come out as the picture shows them, whatever the file holds."""

from __future__ import annotations

import random
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from library.data import images
from library.data.buckets import Placement
from library.options.mistakes import UserError
from tests.data.pictures import noise


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    corner = np.zeros((4, 6, 3), np.uint8)
    corner[0, 0] = 255  # the mark at the top left of the stored pixels
    # EXIF 2.3, tag 0x0112: where the stored first row and column are seen
    seen = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    for orientation, place in seen.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(corner).save(tmp_path / "a.png", exif=exif)
        pixels = images.load(tmp_path / "a.png")
        assert pixels.shape == ((6, 4, 3) if orientation >= 5 else (4, 6, 3))
        assert pixels[place].tolist() == [255, 255, 255] and pixels.sum() == 3 * 255


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    hidden = np.array([[[200, 0, 0, 0], [0, 100, 0, 255], [0, 0, 0, 128]]], np.uint8)
    Image.fromarray(hidden).save(tmp_path / "a.png")
    pixels = images.load(tmp_path / "a.png")
    assert pixels[0, :2].tolist() == [[255, 255, 255], [0, 100, 0]]
    assert abs(int(pixels[0, 2, 0]) - 127) <= 1  # half black on white


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_a_transparent_colour_is_white(tmp_path: Path, mode: str) -> None:
    picture = Image.new("RGB", (2, 1), (10, 10, 10)) if mode != "P" else Image.new("P", (2, 1), 0)
    if mode == "P":
        picture.putpalette([10, 10, 10, 90, 90, 90])
        picture.putpixel((1, 0), 1)
        picture.save(tmp_path / "a.png", transparency=0)
    else:
        picture = picture.convert(mode)
        picture.putpixel((1, 0), 90 if mode == "L" else (90, 90, 90))
        picture.save(tmp_path / "a.png", transparency=10 if mode == "L" else (10, 10, 10))
    assert images.load(tmp_path / "a.png")[0].tolist() == [[255] * 3, [90] * 3]


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    wide = np.array([[0, 128, 257, 386, 65400, 65535]], np.uint16)
    Image.fromarray(wide).save(tmp_path / "grey.png")
    assert images.load(tmp_path / "grey.png")[0, :, 0].tolist() == [0, 0, 1, 2, 254, 255]  # rounded n / 257
    colours = np.repeat(wide[:, :, None], 3, axis=2)
    cv2.imwrite(str(tmp_path / "rgb.png"), colours)
    assert np.abs(images.load(tmp_path / "rgb.png")[0, :, 1].astype(int) - [0, 0, 1, 2, 254, 255]).max() <= 1


def test_modes_become_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (2, 2), (255, 0, 0, 0)).save(tmp_path / "cyan.jpg")  # full cyan ink, no other
    assert np.abs(images.load(tmp_path / "cyan.jpg")[0, 0].astype(int) - [0, 255, 255]).max() <= 2
    Image.new("L", (2, 2), 77).save(tmp_path / "grey.png")
    assert images.load(tmp_path / "grey.png")[1, 1].tolist() == [77, 77, 77]
    Image.new("1", (2, 2), 1).save(tmp_path / "bit.png")
    assert images.load(tmp_path / "bit.png")[1, 1].tolist() == [255, 255, 255]


def test_a_damaged_or_changed_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise((20, 10)).save(path)
    assert images.load(path, (20, 10)).shape == (10, 20, 3)
    with pytest.raises(UserError, match="a.png is 20x10 and was 10x20"):
        images.load(path, (10, 20))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="a.png cannot be decoded"):
        images.load(path)


def test_resize_by_area_or_lanczos() -> None:
    pixels = np.asarray(noise((40, 30)))
    blocks = pixels.reshape(15, 2, 20, 2, 3).mean(axis=(1, 3))
    assert np.abs(images.resize(pixels, (20, 15)) - blocks).max() <= 1  # area: the mean of what a pixel covers
    assert np.array_equal(images.resize(pixels, (40, 15)), cv2.resize(pixels, (40, 15), interpolation=cv2.INTER_AREA))
    for size in ((80, 60), (20, 60), (41, 30)):  # one side grows
        expected = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
        assert np.array_equal(images.resize(pixels, size), np.asarray(expected))
    assert images.resize(pixels, (40, 30)) is pixels


def test_crops() -> None:
    placement = Placement(bucket=(576, 448), resized=(597, 448))
    assert images.centre_offset(placement) == (10, 0)  # floor((597 - 576) / 2)
    offsets = {images.random_offset(placement, random.Random(seed)) for seed in range(600)}
    assert offsets == {(left, 0) for left in range(22)}
    pixels = np.asarray(noise((597, 448)))
    assert np.array_equal(images.fit(pixels, placement, (3, 0)), pixels[:, 3:579])
    assert np.array_equal(images.mirror(pixels)[:, 0], pixels[:, -1])


def test_colours_vary_in_a_third_of_the_samples_and_little() -> None:
    pixels = np.asarray(noise((16, 16)))
    grey = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    changed = hue = gamma = 0
    for seed in range(900):
        varied = images.vary_colour(pixels, random.Random(seed))
        assert varied.shape == pixels.shape and varied.dtype == np.uint8
        greys = images.vary_colour(grey, random.Random(seed))  # a turned hue leaves grey alone
        assert np.abs(greys.astype(int) - grey).max() <= 255 * (1 - 0.95) / 0.95
        if not np.array_equal(varied, pixels):
            changed += 1
            hue += np.array_equal(greys, grey)
            gamma += not np.array_equal(greys, grey)
    assert 240 < changed < 350 and hue > 90 and gamma > 90
    assert np.array_equal(pixels, np.asarray(noise((16, 16))))  # the input is left as it was


def test_floats_reach_from_minus_one_to_one() -> None:
    pixels = np.array([[[0, 255, 51]]], np.uint8)
    floats = images.to_float(pixels)
    assert floats.shape == (3, 1, 1) and floats.dtype == np.float32
    assert floats[:, 0, 0] == pytest.approx([-1, 1, -0.6], abs=1e-6)
