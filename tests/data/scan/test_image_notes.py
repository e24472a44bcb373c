"""Notes about what the scan has seen in the images."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from library.data.scan.image_headers import read_header
from library.data.scan.scan import scan
from library.options.datasets import CaptionSource
from tests.data.image_files import dataset, save, subset
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


@pytest.mark.parametrize(
    ("source", "lacks"),
    [
        ("files", "a caption file or class tokens"),
        ("class_tokens", "class tokens"),
        ("file_name", "words in its file name"),
    ],
)
def test_what_an_image_without_a_caption_lacks(source: CaptionSource, lacks: str, tmp_path: Path) -> None:
    """Metadata files: test_metadata_files.py."""
    save(tmp_path / "x" / "_.png")
    save(tmp_path / "y" / "a.png", caption="a dog")
    found = scan([dataset(subset(tmp_path / "x", caption_source=source), subset(tmp_path / "y"))])
    assert f"1 image without {lacks}, so an empty caption" in found.notes
