"""An image that drawing begins with: upright, covering the size that is drawn, cut at its centre."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from library.families.sd.refiner import REFINER
from library.families.sd.sdxl import SDXL
from library.options.mistakes import UserError
from library.sampling.init_images import InitImage, encode_init_image, read_init_image
from library.sampling.prompts import ImageRequest

RED, BLUE = (255, 0, 0), (0, 0, 255)


def halves(width: int, height: int) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def pixels_of(start: InitImage, width: int, height: int) -> torch.Tensor:
    """What the VAE is given, (3, H, W)."""
    given: list[torch.Tensor] = []

    def encode(vae: Any, pixels: torch.Tensor, generators: Any) -> torch.Tensor:
        given.append(pixels)
        return torch.zeros(1, 4, 1, 1)

    model: Any = SimpleNamespace(vae=None, family=SimpleNamespace(encode_images=encode))
    encode_init_image(model, start, [ImageRequest("a", width=width, height=height, seed=1)])
    return given[0][0]


@pytest.mark.parametrize(("width", "height"), [(64, 64), (128, 64), (64, 128)])
def test_it_covers_the_size_and_is_cut_at_the_centre(width: int, height: int) -> None:
    pixels = pixels_of(InitImage(halves(200, 100)), width, height)
    assert pixels.shape == (3, height, width)
    left, right = pixels[:, height // 2, width // 4].tolist(), pixels[:, height // 2, -(width // 4)].tolist()
    assert left == [1, -1, -1] and right == [-1, -1, 1]


def test_its_own_size_is_one_that_can_be_drawn() -> None:
    assert InitImage(halves(100, 72)).size == (96, 72)
    assert InitImage(halves(20, 1000)).size == (64, 1000)


def test_it_stands_upright(tmp_path: Path) -> None:
    """EXIF orientation 6: turned by a quarter to the right when it is shown (CIPA DC-008, section 4.6.5)."""
    exif = Image.Exif()
    exif[0x0112] = 6
    halves(80, 64).save(tmp_path / "a.jpg", exif=exif, quality=100)
    image = read_init_image(tmp_path / "a.jpg", None, 2.0).image
    assert image.size == (64, 80)
    red, _, blue = image.getpixel((32, 5))
    assert red > 200 > 50 > blue


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"not an image")
    for name in ("a.png", "gone.png"):
        with pytest.raises(UserError, match=f"--image_path .*{name} cannot be read"):
            read_init_image(tmp_path / name, None, 2.0)


def test_an_image_above_the_limit_is_refused_by_its_flag(tmp_path: Path) -> None:
    """80 x 64 pixels of 4 bytes are 20 KiB."""
    halves(80, 64).save(tmp_path / "a.png")
    assert read_init_image(tmp_path / "a.png", None, 20 / 1024**2).size == (80, 64)
    with pytest.raises(UserError, match=r"80x64 pixels need .* GiB of memory, more than --max_image_memory"):
        read_init_image(tmp_path / "a.png", None, 19 / 1024**2)


def test_its_transparency_is_white_as_in_training(tmp_path: Path) -> None:
    """Not the colour that is stored below it."""
    Image.new("RGBA", (64, 64), (*BLUE, 0)).save(tmp_path / "a.png")
    assert read_init_image(tmp_path / "a.png", None, 2.0).image.getpixel((5, 5)) == (255, 255, 255)


def test_how_much_is_drawn_anew() -> None:
    image = halves(64, 64)
    for family, default in ((REFINER, 0.2), (SDXL, 0.8)):
        assert InitImage(image, 0.5).strength_for(family) == 0.5
        assert InitImage(image).strength_for(family) == default
