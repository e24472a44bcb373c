"""Pixels are those that a viewer shows, for every kind of file."""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from library.data import images
from library.data.buckets import Placement
from library.data.images import Geometry, decide_geometry
from library.options.datasets import ImageSettings
from library.options.mistakes import UserError
from tests.data.image_files import noise


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
    image = Image.new("RGB", (2, 1), (10, 10, 10)) if mode != "P" else Image.new("P", (2, 1), 0)
    if mode == "P":
        image.putpalette([10, 10, 10, 90, 90, 90])
        image.putpixel((1, 0), 1)
        image.save(tmp_path / "a.png", transparency=0)
    else:
        image = image.convert(mode)
        image.putpixel((1, 0), 90 if mode == "L" else (90, 90, 90))
        image.save(tmp_path / "a.png", transparency=10 if mode == "L" else (10, 10, 10))
    assert images.load(tmp_path / "a.png")[0].tolist() == [[255] * 3, [90] * 3]


def write_png(path: Path, depth: int, kind: int, row: bytes, transparent: bytes) -> Path:
    """One row of two pixels, by the PNG specification: no library writes these depths with a transparent value."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, kind, 0, 0, 0)) + chunk(b"tRNS", transparent)
    body = chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + body)
    return path


def test_a_transparent_value_is_as_deep_as_its_image(tmp_path: Path) -> None:
    grey_4 = write_png(tmp_path / "4.png", 4, 0, b"\x5a", struct.pack(">H", 5))  # 5 and 10 of 15
    assert images.load(grey_4, background=(1, 2, 3))[0].tolist() == [[1, 2, 3], [170] * 3]
    grey_2 = write_png(tmp_path / "2.png", 2, 0, b"\xb0", struct.pack(">H", 2))  # 2 and 3 of 3
    assert images.load(grey_2, background=(1, 2, 3))[0].tolist() == [[1, 2, 3], [255] * 3]
    one, other = struct.pack(">3H", 0x1234, 0x5678, 0x9ABC), struct.pack(">3H", 65535, 0, 65535)
    wide = write_png(tmp_path / "16.png", 16, 2, one + other, one)
    assert images.load(wide, background=(1, 2, 3))[0].tolist() == [[1, 2, 3], [255, 0, 255]]


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


def test_what_is_transparent_is_laid_on_the_background_that_was_chosen(tmp_path: Path) -> None:
    hidden = np.array([[[200, 0, 0, 0], [0, 100, 0, 255]]], np.uint8)
    Image.fromarray(hidden).save(tmp_path / "a.png")
    assert images.load(tmp_path / "a.png", background=(1, 2, 3))[0].tolist() == [[1, 2, 3], [0, 100, 0]]
    Image.fromarray(np.array([[300, 65535]], np.uint16)).save(tmp_path / "wide.png", transparency=300)
    assert images.load(tmp_path / "wide.png", background=(1, 2, 3))[0].tolist() == [[1, 2, 3], [255, 255, 255]]


def test_grey_with_alpha_and_palettes_with_graded_transparency(tmp_path: Path) -> None:
    grey = Image.new("LA", (2, 1), (50, 0))
    grey.putpixel((1, 0), (80, 255))
    grey.save(tmp_path / "grey.png")
    assert images.load(tmp_path / "grey.png", background=(9, 8, 7))[0].tolist() == [[9, 8, 7], [80, 80, 80]]
    palette = Image.new("P", (3, 1))
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    palette.putdata([0, 1, 2])
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 255, 128]))
    seen = images.load(tmp_path / "palette.png", background=(0, 0, 0))[0]
    assert seen[:2].tolist() == [[0, 0, 0], [0, 200, 0]] and abs(int(seen[2, 2]) - 100) <= 1
    palette.save(tmp_path / "solid.png")
    assert images.load(tmp_path / "solid.png")[0].tolist() == [[200, 0, 0], [0, 200, 0], [0, 0, 200]]


@pytest.mark.parametrize("ending", ["gif", "png", "webp"])
def test_of_a_film_the_first_frame_is_taken(tmp_path: Path, ending: str) -> None:
    first, second = Image.new("RGB", (16, 8), (250, 0, 0)), Image.new("RGB", (16, 8), (0, 0, 250))
    lossless = {"lossless": True} if ending == "webp" else {}
    path = tmp_path / f"film.{ending}"
    first.save(path, save_all=True, append_images=[second], duration=100, **lossless)
    with Image.open(path) as film:
        assert film.n_frames == 2
    pixels = images.load(path, (16, 8))
    assert (pixels == (250, 0, 0)).all()


@pytest.mark.parametrize("ending", ["bmp", "gif", "jpg", "png", "tif", "webp", "avif"])
def test_every_format_shows_its_colours_and_sides(tmp_path: Path, ending: str) -> None:
    image = Image.new("RGB", (64, 32), (20, 120, 220))
    image.paste((220, 120, 20), (0, 0, 32, 32))  # left half
    path = tmp_path / f"a.{ending}"
    if ending not in {e.lstrip(".") for e in Image.registered_extensions()}:
        pytest.skip(f"this Pillow has no {ending}")
    image.save(path, quality=95)
    pixels = images.load(path, (64, 32)).astype(int)
    assert np.abs(pixels[16, 8] - (220, 120, 20)).max() <= 8
    assert np.abs(pixels[16, 56] - (20, 120, 220)).max() <= 8


def test_a_format_without_its_package_is_said(tmp_path: Path) -> None:
    if ".jxl" in Image.registered_extensions():
        pytest.skip("JPEG XL can be read here")
    path = tmp_path / "a.jxl"
    path.write_bytes(b"\xff\x0a" + bytes(40))
    with pytest.raises(UserError, match=r"a\.jxl cannot be decoded(.|\n)*pillow-jxl-plugin"):
        images.load(path)


def test_a_damaged_orientation_counts_as_none(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "a.webp"):
        noise((20, 10)).save(tmp_path / name, exif=b"Exif\x00\x00MM\x00*\x00\x00\x00")
        assert images.load(tmp_path / name).shape == (10, 20, 3)


def test_names_of_any_script_are_opened(tmp_path: Path) -> None:
    for name in ("夏の犬.png", "собака.jpg", "dog 🐕 'x'.webp"):
        noise((12, 8)).save(tmp_path / name)
        assert images.load(tmp_path / name, (12, 8)).shape == (8, 12, 3)


def test_a_damaged_or_changed_image_is_named(tmp_path: Path) -> None:
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


def test_resize_by_the_interpolation_that_was_chosen() -> None:
    pixels = np.asarray(noise((40, 30)))
    kernels = {"nearest": 0, "bilinear": 1, "linear": 1, "bicubic": 2, "cubic": 2, "area": 3}  # OpenCV's numbers
    for size in ((31, 17), (80, 60), (40, 60)):
        for name, kernel in kernels.items():
            expected = cv2.resize(pixels, size, interpolation=kernel)
            assert np.array_equal(images.resize(pixels, size, name), expected), name
        for name, kernel in {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}.items():
            expected = np.asarray(Image.fromarray(pixels).resize(size, kernel))
            assert np.array_equal(images.resize(pixels, size, name), expected), name
    assert images.resize(pixels, (40, 30), "nearest") is pixels
    with pytest.raises(ValueError, match="nearby"):
        images.resize(pixels, (20, 15), "nearby")


PLACEMENT = Placement(bucket=(576, 448), resized=(597, 448))


def test_crops() -> None:
    assert images.centre_offset(PLACEMENT) == (10, 0)  # floor((597 - 576) / 2)
    offsets = {images.random_offset(PLACEMENT, random.Random(seed)) for seed in range(600)}
    assert offsets == {(left, 0) for left in range(22)}
    pixels = np.asarray(noise((597, 448)))
    assert np.array_equal(
        images.apply(pixels, images.Geometry(PLACEMENT.resized, (3, 0), PLACEMENT.bucket)), pixels[:, 3:579]
    )
    assert np.array_equal(images.mirror(pixels)[:, 0], pixels[:, -1])


def offset(chosen: ImageSettings, seed: int = 0) -> tuple[int, int]:
    return decide_geometry(PLACEMENT, chosen, "a.png", (640, 480), random.Random(seed), random.Random(seed)).offset


def test_the_geometry_is_centre_corner_or_anywhere() -> None:
    assert offset(ImageSettings()) == (10, 0)
    assert offset(ImageSettings(corner_crop=True)) == (0, 0)
    anywhere = {offset(ImageSettings(random_crop=True), seed) for seed in range(600)}
    assert anywhere == {(left, 0) for left in range(22)}
    shown = decide_geometry(PLACEMENT, ImageSettings(interpolation="cubic"), "a.png", (640, 480), random.Random(0))
    assert shown == Geometry((597, 448), (10, 0), (576, 448), False, "cubic")


def test_half_of_the_samples_are_mirrored_and_only_with_flip() -> None:
    def flipped(chosen: ImageSettings, seed: int) -> bool:
        return decide_geometry(PLACEMENT, chosen, "a.png", (640, 480), random.Random(0), random.Random(seed)).flipped

    assert 400 < sum(flipped(ImageSettings(flip=True), seed) for seed in range(1000)) < 600
    assert not any(flipped(ImageSettings(), seed) for seed in range(50))


def test_without_generators_nothing_is_left_to_chance() -> None:
    everything = ImageSettings(random_crop=True, flip=True, face_crop=(2.0, 4.0))
    assert decide_geometry(PLACEMENT, everything, "a_300_200_50_50.png", (640, 480)) == Geometry(
        (597, 448), (10, 0), (576, 448)
    )


def test_what_a_sample_shows_is_scaled_then_cut_then_mirrored() -> None:
    pixels = np.asarray(noise((80, 60)))
    shown = images.apply(pixels, Geometry((40, 30), (4, 2), (32, 24), True, "area"))
    assert np.array_equal(shown, cv2.resize(pixels, (40, 30), interpolation=cv2.INTER_AREA)[2:26, 4:36][:, ::-1])


def test_the_crop_is_told_where_it_was_made_and_mirrored_with_the_image() -> None:
    assert images.crop_ltrb(Geometry((597, 448), (10, 0), (576, 448))) == (10, 0, 586, 448)
    # the mirrored image, 597 wide, cut 11 from its left, is the mirrored crop
    assert images.crop_ltrb(Geometry((597, 448), (10, 0), (576, 448), True)) == (11, 0, 587, 448)
    pixels = np.asarray(noise((597, 448)))
    shown = Geometry((597, 448), (10, 0), (576, 448), True)
    left, top, right, bottom = images.crop_ltrb(shown)
    assert np.array_equal(images.apply(pixels, shown), pixels[:, ::-1][top:bottom, left:right])


SQUARE = Placement(bucket=(512, 512), resized=(683, 512))  # of 2000 x 1500, without buckets
FACE = "girl_1500_400_250_200.png"  # centre at (1500, 400), 250 wide, 200 high


def around(name: str, chosen: ImageSettings, seed: int = 0, size: tuple[int, int] = (2000, 1500)) -> Geometry:
    return decide_geometry(SQUARE, chosen, name, size, random.Random(seed), random.Random(seed))


def test_a_face_crop_holds_as_many_faces_as_asked_with_the_face_in_the_middle() -> None:
    shown = around("sub/folder/" + FACE, ImageSettings(face_crop=(4.0, 4.0)))
    # 512 pixels are to hold 4 x 250: scale 0.512, the face at (768, 204.8), so the crop begins 256 before; not above 0
    assert shown.resized == (1024, 768)
    assert shown.offset == (512, 0)
    closer = around(FACE, ImageSettings(face_crop=(2.5, 2.5)))  # scale 0.8192: face at (1228.8, 327.68)
    assert closer.resized == (1638, 1229) and closer.offset == (1229 - 256, 328 - 256)


def test_a_face_crop_draws_its_scale_from_the_range_and_stays_in_the_image() -> None:
    widths, inside = [], []
    for seed in range(400):
        for loose in (False, True):
            chosen = ImageSettings(face_crop=(2.5, 5.0), random_crop=loose)
            shown = around("a_1000_750_250_200.png", chosen, seed)
            (width, height), (left, top) = shown.resized, shown.offset
            widths.append(width)
            assert height == pytest.approx(width * 0.75, abs=1)
            assert 0 <= left <= width - 512 and 0 <= top <= height - 512
            scale = width / 2000
            inside.append((loose, left + 256 - 1000 * scale, 250 * scale))
    # 512 / (5 x 250) x 2000 = 819.2, and twice that
    assert 819 <= min(widths) < 840 and 1600 < max(widths) <= 1639
    assert all(abs(off) <= face / 20 + 2 for loose, off, face in inside if not loose)
    far = [abs(off) for loose, off, _ in inside if loose]
    assert max(far) > 200


def test_a_face_crop_enlarges_only_to_cover() -> None:
    assert around("a_1000_700_40_40.png", ImageSettings(face_crop=(2.0, 2.0))).resized == (2000, 1500)  # not 6.4 times
    assert around("a_1000_700_900_900.png", ImageSettings(face_crop=(9.0, 9.0))).resized == (683, 512)  # covers
    small = around("a_150_100_30_30.png", ImageSettings(face_crop=(2.0, 4.0)), size=(300, 200))
    assert small.resized == (768, 512)


@pytest.mark.parametrize(
    "name", ["a.png", "a_1_2_3.png", "a_1_2_3_4_b.png", "a_0_5_9_9.png", "a_5_5_0_0.png", "1_2_3_4.png"]
)
def test_a_name_without_a_face_is_cropped_as_usual(name: str) -> None:
    assert around(name, ImageSettings(face_crop=(2.0, 4.0))) == Geometry((683, 512), (85, 0), (512, 512))
    assert around(FACE, ImageSettings()) == Geometry((683, 512), (85, 0), (512, 512))


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


@pytest.mark.parametrize("level", [0, 6])
def test_damaged_pixels_of_a_png_are_not_trained(tmp_path: Path, level: int) -> None:
    """At compression level 0 the file holds raw pixels, so it can be decoded whatever they are changed to."""
    path = tmp_path / "a.png"
    noise((64, 48)).save(path, compress_level=level)
    data = bytearray(path.read_bytes())
    images.load(path)
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.png cannot be decoded"):
        images.load(path)
