"""An image is written whole or not at all."""

from __future__ import annotations

import errno

import pytest
from PIL import Image

from library.options.mistakes import UserError
from library.sampling.prompts import ImageRequest
from library.sampling.write_image import write_image

REQUEST = ImageRequest("a dog", seed=1)


class FullDisk(Image.Image):
    """An image that ends in the middle of being written."""

    def save(self, stream, *_, **__):
        stream.write(b"\x89PNG half of it")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_half_a_image_is_not_left(tmp_path):
    path = tmp_path / "dog.png"
    with pytest.raises(UserError, match="No space left"):
        write_image(path, REQUEST, FullDisk())
    assert not list(tmp_path.iterdir())
    write_image(path, REQUEST, Image.new("RGB", (8, 8), "red"))
    with pytest.raises(UserError, match="No space left"):
        write_image(path, REQUEST, FullDisk())
    assert [each.name for each in tmp_path.iterdir()] == ["dog.png"]
    with Image.open(path) as image:
        assert image.convert("RGB").getpixel((0, 0)) == (255, 0, 0) and image.text["seed"] == "1"
