"""Headers agree with the decoded image."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from library.data import images
from library.data.decoding import decode
from library.data.image_files import BadImage, missing_package, readable_extensions
from library.data.scan.image_headers import read_header
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


def read_both(path: Path) -> tuple[int, int]:
    """The size by the header, with which the decoded image must agree."""
    header = read_header(path)
    assert images.load(path, header.size).shape == (*header.size[::-1], 3)
    return header.size


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (b"zTXt", b"workflow\0\0" + zlib.compress(bytes(4 << 20))),
        (b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(bytes(4 << 20))),
        (b"tEXt", b"workflow\0" + b" " * (70 << 20)),
    ],
)
def test_a_png_with_large_texts_is_whole(tmp_path: Path, kind: bytes, text: bytes) -> None:
    """ComfyUI stores its workflow in them. Pillow's limits are 1 MiB for a packed text and 64 MiB for all."""
    texts = PngImagePlugin.PngInfo()
    texts.add(kind, text)
    noise((20, 10)).save(tmp_path / "a.png", pnginfo=texts)
    assert read_both(tmp_path / "a.png") == (20, 10)


def test_a_png_whose_text_is_a_bomb_is_refused(tmp_path: Path) -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(300 << 20), 1))
    noise((20, 10)).save(tmp_path / "a.png", pnginfo=texts)
    with pytest.raises(BadImage, match="too large"):
        read_header(tmp_path / "a.png")


@pytest.mark.parametrize("more", [bytes(100_000), b"\xff" * 100_000, b"a whole archive " * 10_000])
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "avif", "bmp", "gif", "tif"])
def test_bytes_behind_an_image_do_no_harm(tmp_path: Path, ending: str, more: bytes) -> None:
    path = tmp_path / f"a.{ending}"
    if path.suffix not in readable_extensions():
        pytest.skip(f"this Pillow has no {ending}")
    noise((120, 90)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole + more)
    assert read_both(path) == (120, 90)
    path.write_bytes(whole[:-200])
    with pytest.raises(BadImage, match="truncated|decode"):
        read_header(path)


def test_a_png_with_other_bytes_behind_it_is_turned_upright(tmp_path: Path) -> None:
    """The PNG standard allows eXIf behind the pixels (section 11.3.4.6 of the third edition)."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.png"
    noise((120, 90)).save(path, exif=exif)
    data = path.read_bytes()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    path.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:] + bytes(200_000))
    assert read_both(path) == (90, 120)


def test_a_png_without_its_last_chunk_is_not_damaged(tmp_path: Path) -> None:
    """All pixels are there and match their checksums."""
    noise((120, 90)).save(tmp_path / "a.png")
    path = tmp_path / "a.png"
    path.write_bytes(path.read_bytes()[:-12])
    assert read_both(path) == (120, 90)
    path.write_bytes(path.read_bytes()[:-3])  # of the checksum of the pixels
    with pytest.raises(BadImage, match="truncated"):
        read_header(path)


def test_the_photos_of_phones_are_read(tmp_path: Path) -> None:
    """201 megapixels; Pillow's own limit is 178 956 970."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = struct.pack(">IIBBBBB", 16_384, 12_288, 1, 0, 0, 0, 0)  # one bit per pixel
    rows = zlib.compress((b"\0" + b"\xff" * (16_384 // 8)) * 12_288, 1)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(png)
    assert read_header(tmp_path / "a.png").size == (16_384, 12_288)
    assert decode(tmp_path / "a.png", lambda image: (image.size, image.getpixel((9, 9)))) == ((16_384, 12_288), 255)
