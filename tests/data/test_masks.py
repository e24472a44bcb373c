"""Masks weight the loss per pixel, and stay aligned with their images."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.data import images, masks
from library.data.buckets import Placement
from library.data.images import Geometry, decide_geometry
from library.options.datasets import ImageSettings
from library.options.mistakes import UserError
from tests.data.image_files import noise


def test_a_mask_counts_by_its_luminance(tmp_path: Path) -> None:
    """ITU-R BT.601: 0.299 red + 0.587 green + 0.114 blue."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 128, 0), (200, 200, 200), (255, 255, 255)]
    expected = [[76, 150, 29, 75, 200, 255]]
    image = Image.new("RGB", (6, 1))
    image.putdata(colours)
    palette = Image.new("P", (6, 1))
    palette.putpalette([part for colour in colours for part in colour])
    palette.putdata(range(6))
    for kind in (image, palette):
        kind.save(tmp_path / "a.png")
        mask = masks.load(tmp_path / "a.png", (6, 1))
        assert mask.dtype == np.uint8 and mask.tolist() == expected, kind.mode


def test_masks_of_every_mode(tmp_path: Path) -> None:
    grey = Image.new("L", (3, 1))
    grey.putdata([0, 100, 255])
    for mode in ("L", "P", "RGB", "RGBA", "LA"):
        grey.convert(mode).save(tmp_path / "a.png")
        assert masks.load(tmp_path / "a.png", (3, 1)).tolist() == [[0, 100, 255]], mode
    grey.point(lambda value: 255 * (value > 50)).convert("1").save(tmp_path / "a.png")
    assert masks.load(tmp_path / "a.png", (3, 1)).tolist() == [[0, 255, 255]]
    Image.fromarray(np.array([[0, 25700, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert masks.load(tmp_path / "a.png", (3, 1)).tolist() == [[0, 100, 255]]


def test_what_is_transparent_in_a_mask_does_not_count(tmp_path: Path) -> None:
    cut_out = np.array([[[255, 255, 255, 0], [255, 255, 255, 255], [255, 0, 0, 128]]], np.uint8)
    Image.fromarray(cut_out).save(tmp_path / "a.png")
    assert masks.load(tmp_path / "a.png", (3, 1))[0].tolist() == pytest.approx([0, 255, 0.299 * 128], abs=1)


def test_a_mask_is_turned_upright(tmp_path: Path) -> None:
    corner = np.zeros((4, 6), np.uint8)
    corner[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored left top is seen at the right top
    Image.fromarray(corner).save(tmp_path / "a.png", exif=exif)
    mask = masks.load(tmp_path / "a.png", (4, 6))
    assert mask[0, 3] == 255 and mask.sum() == 255


def test_a_mask_in_the_same_proportion_is_scaled(tmp_path: Path) -> None:
    small = np.zeros((48, 64), np.uint8)
    small[:, 32:] = 255
    Image.fromarray(small).save(tmp_path / "a.png")
    mask = masks.load(tmp_path / "a.png", (640, 480))
    assert mask.shape == (480, 640) and mask[:, :300].max() == 0 and mask[:, 340:].min() == 255
    Image.new("L", (125, 83), 255).save(tmp_path / "b.png")  # an eighth of 1001 x 667, rounded
    assert masks.load(tmp_path / "b.png", (1001, 667)).min() == 255
    Image.new("L", (1001, 667), 255).save(tmp_path / "c.png")
    assert masks.load(tmp_path / "c.png", (125, 83)).shape == (83, 125)


@pytest.mark.parametrize("size", [(480, 640), (64, 64), (640, 470)])
def test_a_mask_of_another_shape_is_refused_with_both_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("L", size, 255).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=rf"mask .*a\.png is {size[0]}x{size[1]}, its image 640x480"):
        masks.load(tmp_path / "a.png", (640, 480))


def test_a_damaged_mask_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match=r"mask .*a\.png cannot be decoded"):
        masks.load(tmp_path / "a.png", (2, 2))


def test_transparency_is_a_mask(tmp_path: Path) -> None:
    values = np.array([[[9, 9, 9, 0], [9, 9, 9, 100], [9, 9, 9, 255]]], np.uint8)
    for ending in ("png", "webp"):
        path = tmp_path / f"a.{ending}"
        Image.fromarray(values).save(path, **({"lossless": True, "exact": True} if ending == "webp" else {}))
        assert masks.from_transparency(path, (3, 1)).tolist() == [[0, 100, 255]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([5, 5, 5, 6, 6, 6])
    palette.putdata([0, 1])
    palette.save(tmp_path / "a.png", transparency=1)
    assert masks.from_transparency(tmp_path / "a.png").tolist() == [[255, 0]]
    Image.fromarray(np.array([[7, 300]], np.uint16)).save(tmp_path / "a.png", transparency=300)
    assert masks.from_transparency(tmp_path / "a.png").tolist() == [[255, 0]]


def test_the_transparency_of_an_opaque_image_is_white(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.bmp"):
        noise((6, 4)).save(tmp_path / name)
        assert masks.from_transparency(tmp_path / name, (6, 4)).tolist() == [[255] * 6] * 4
    Image.fromarray(np.array([[7, 300]], np.uint16)).save(tmp_path / "a.png")
    assert masks.from_transparency(tmp_path / "a.png").tolist() == [[255, 255]]
    with pytest.raises(UserError, match=r"a\.jpg is 6x4 and was 4x6"):
        masks.from_transparency(tmp_path / "a.jpg", (4, 6))


INTERPOLATIONS = (None, "lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")
CROPS = {
    "centre": ImageSettings(flip=True),
    "corner": ImageSettings(flip=True, corner_crop=True),
    "random": ImageSettings(flip=True, random_crop=True),
    "face": ImageSettings(flip=True, face_crop=(1.5, 3.0)),
    "loose face": ImageSettings(flip=True, face_crop=(1.5, 3.0), random_crop=True),
}
PLACES = [  # placement, size: made smaller, larger, both at once, and left as it is
    (Placement((64, 48), (71, 48)), (213, 144)),
    (Placement((128, 128), (192, 128)), (96, 64)),
    (Placement((100, 60), (100, 90)), (110, 70)),
    (Placement((96, 64), (110, 70)), (110, 70)),
]


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("crop", CROPS)
def test_a_image_that_is_its_own_mask_stays_so(tmp_path: Path, crop: str, interpolation: str | None) -> None:
    """Bit-equal under every crop, flip, scale and interpolation, from the file to the sample."""
    seen = set()
    for (place, (placement, size)), seed in itertools.product(enumerate(PLACES), range(4)):
        name = f"a{place}_{size[0] // 3}_{size[1] // 2}_20_30.png"
        if seed == 0:
            noise(size, seed=place, mode="L").save(tmp_path / name)
        chosen = ImageSettings(**{**vars(CROPS[crop]), "interpolation": interpolation})
        shown = decide_geometry(placement, chosen, name, size, random.Random(seed), random.Random(seed))
        image = images.apply(images.load(tmp_path / name, size), shown)
        mask = masks.apply(masks.load(tmp_path / name, size), shown)
        assert mask.shape == placement.bucket[::-1]
        for channel in range(3):
            assert np.array_equal(image[:, :, channel], mask)
        seen.add((shown.flipped, shown.offset, shown.resized))
    assert {flipped for flipped, _, _ in seen} == {False, True}


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_a_image_that_is_its_own_mask_stays_so_at_any_size(interpolation: str | None) -> None:
    rng = random.Random(1)
    for seed in range(120):
        size, resized = ((rng.randint(8, 120), rng.randint(8, 120)) for _ in range(2))
        grey = np.asarray(noise(size, seed, mode="L"))
        shown = Geometry(resized, (0, 0), resized, interpolation=interpolation)
        image = images.apply(np.stack([grey] * 3, axis=2), shown)
        assert np.array_equal(image, np.stack([masks.apply(grey, shown)] * 3, axis=2)), (size, resized)


def test_floats_reach_from_zero_to_one() -> None:
    mask = masks.to_float(np.array([[0, 51, 255]], np.uint8)[:, ::-1])
    assert mask.dtype == np.float32 and mask.flags.c_contiguous
    assert mask.tolist() == [[1.0, pytest.approx(0.2), 0.0]]


def test_a_mask_is_reduced_by_area_and_keeps_its_mean() -> None:
    """A 10 x 10 square in 512 x 512 weighs 100 / 262144 = 0.00038147, at any position."""
    for top, left in ((0, 0), (7, 3), (250, 255), (502, 502)):
        mask = torch.zeros(512, 512)
        mask[top : top + 10, left : left + 10] = 1.0
        small = masks.to_latent_size(mask, (64, 64))
        assert small.shape == (1, 64, 64) and small.dtype == torch.float32
        assert small.mean().item() == pytest.approx(100 / 512**2, rel=1e-6)
    rows = torch.zeros(16, 32)
    rows[:4] = 1.0
    assert masks.to_latent_size(rows, (4, 2))[0].tolist() == [[0.5] * 4, [0.0] * 4]


@pytest.mark.parametrize(
    ("size", "latent"), [((100, 61), (12, 7)), ((37, 53), (5, 6)), ((8, 8), (3, 8)), ((9, 9), (9, 9))]
)
def test_sizes_that_do_not_divide_keep_the_mean_too(size: tuple[int, int], latent: tuple[int, int]) -> None:
    mask = torch.rand(size[1], size[0], generator=torch.Generator().manual_seed(1))
    small = masks.to_latent_size(mask, latent)
    assert small.shape == (1, latent[1], latent[0])
    assert small.double().mean().item() == pytest.approx(mask.double().mean().item(), rel=1e-6)
    # by brute force: every pixel as a block of equal points, counted out to the places
    fine = mask.repeat_interleave(latent[1], 0).repeat_interleave(latent[0], 1)
    blocks = fine.reshape(latent[1], size[1], latent[0], size[0]).mean(dim=(1, 3))
    torch.testing.assert_close(small[0], blocks, atol=1e-5, rtol=0)


def test_a_white_mask_is_exactly_white_at_any_size() -> None:
    for size, latent in itertools.product([(512, 512), (100, 61), (77, 1000)], [(64, 64), (12, 7), (9, 50)]):
        assert (masks.to_latent_size(torch.ones(size[1], size[0]), latent) == 1.0).all()
        assert (masks.to_latent_size(torch.zeros(size[1], size[0]), latent) == 0.0).all()


def test_where_the_size_divides_the_mask_is_torchs_area() -> None:
    mask = torch.rand(96, 64, generator=torch.Generator().manual_seed(2))
    expected = torch.nn.functional.interpolate(mask[None, None], size=(12, 8), mode="area")[0]
    torch.testing.assert_close(masks.to_latent_size(mask, (8, 12)), expected)


def test_a_mirrored_mask_at_latent_size_is_the_mirror_of_the_plain_one() -> None:
    mask = np.asarray(noise((64, 48), mode="L"))
    plain = masks.apply(mask, Geometry((64, 48), (0, 0), (64, 48)))
    mirrored = masks.apply(mask, Geometry((64, 48), (0, 0), (64, 48), True))
    small, other = (masks.to_latent_size(torch.from_numpy(masks.to_float(m)), (8, 6)) for m in (plain, mirrored))
    torch.testing.assert_close(other, small.flip(2))
