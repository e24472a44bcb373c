"""Headers agree with the decoded image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from library.data import images
from library.data.image_files import missing_package, readable_extensions
from library.data.scan.image_headers import BadImage, read_header
from tests.data.image_files import noise

WRITTEN: list[tuple[str, str, dict[str, Any]]] = [
    ("a.png", "RGB", {}),
    ("a.png", "RGBA", {}),
    ("a.png", "L", {}),
    ("a.png", "LA", {}),
    ("a.jpg", "RGB", {}),
    ("a.jpg", "CMYK", {}),
    ("a.jpeg", "L", {"progressive": True}),
    ("a.webp", "RGB", {}),
    ("a.webp", "RGBA", {"lossless": True}),
    ("a.bmp", "RGB", {}),
    ("a.avif", "RGB", {}),
    ("gif.png", "RGB", {"format": "GIF"}),
]


@pytest.mark.parametrize("turned", [1, 3, 6])
@pytest.mark.parametrize(("name", "mode", "keywords"), WRITTEN)
def test_the_header_tells_the_size_that_the_image_has(
    tmp_path: Path, name: str, mode: str, keywords: dict[str, Any], turned: int
) -> None:
    if Path(name).suffix not in readable_extensions():
        pytest.skip(f"this Pillow has no {name}")
    exif = Image.Exif()
    exif[0x0112] = turned
    can_turn = name.endswith((".png", ".jpg", ".jpeg", ".webp", ".avif")) and "format" not in keywords
    noise((32, 24), mode=mode).save(tmp_path / name, **keywords, **({"exif": exif} if can_turn else {}))
    header = read_header(tmp_path / name)
    assert header.size == ((24, 32) if turned == 6 and can_turn else (32, 24))
    assert images.load(tmp_path / name, header.size).shape == (*header.size[::-1], 3)
    assert header.transparent == (mode in ("RGBA", "LA"))


def test_what_may_be_transparent_is_told(tmp_path: Path) -> None:
    for mode, transparent in (("RGB", (1, 2, 3)), ("L", 5), ("P", 0), ("1", 0)):
        Image.new(mode, (4, 4)).save(tmp_path / "a.png", transparency=transparent)
        assert read_header(tmp_path / "a.png").transparent, mode
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "a.png", transparency=7)
    assert read_header(tmp_path / "a.png").transparent
    Image.new("P", (4, 4)).save(tmp_path / "a.png")
    assert not read_header(tmp_path / "a.png").transparent


def test_a_damaged_orientation_counts_as_none(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "a.webp"):
        noise((20, 10)).save(tmp_path / name, exif=b"Exif\x00\x00MM\x00*\x00\x00\x00")
        assert read_header(tmp_path / name).size == (20, 10)


def test_the_package_that_reads_a_format_is_named() -> None:
    assert missing_package(Path("a.png")) is None and missing_package(Path("a.txt")) is None
    if ".jxl" not in readable_extensions():
        assert missing_package(Path("A.JXL")) == "pillow-jxl-plugin"


def test_a_image_without_its_package_is_told_so(tmp_path: Path) -> None:
    if ".jxl" in readable_extensions():
        pytest.skip("JPEG XL can be read here")
    (tmp_path / "a.jxl").write_bytes(b"\xff\x0a" + bytes(40))
    with pytest.raises(BadImage, match="pillow-jxl-plugin"):
        read_header(tmp_path / "a.jxl")
