"""Notes about what the scan has seen in the images."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from library.data.scan.image_headers import read_header
from tests.data.scan.test_scan import run

FRAMES = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]


@pytest.mark.parametrize("ending", [".gif", ".webp", ".png", ".tif", ".avif"])
def test_frames_after_the_first_are_told(ending: str, tmp_path: Path) -> None:
    folder = tmp_path / "1_dog"
    folder.mkdir()
    moving, still = folder / f"moving{ending}", folder / f"still{ending}"
    FRAMES[0].save(moving, save_all=True, append_images=FRAMES[1:])
    FRAMES[0].save(still)
    assert (read_header(moving).animated, read_header(still).animated) == (True, False)
    expected = f"1 image with several frames or pages, of which only the first is used: {moving}"
    for _ in range(2):  # read, then from the index
        assert expected in run(tmp_path, index=tmp_path / "index").notes


def test_the_second_picture_of_a_phones_jpeg_is_no_frame(tmp_path: Path) -> None:
    FRAMES[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=FRAMES[1:])
    assert not read_header(tmp_path / "a.jpg").animated
