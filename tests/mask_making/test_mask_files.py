"""Mask files: names that training pairs with the images, and records in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data.scan.mask_files import find_masks
from library.mask_making.mask_files import name_masks, read_record, write_mask
from library.options.mistakes import Mistakes, UserError

NAMES = ["a.png", "b.jpg", "sub/b.webp", "c.png", "c.jpg", "d.tar.png", "Ü 'x\".gif", "E.png", "e.bmp"]


@pytest.mark.parametrize("beside", [False, True])
def test_training_finds_the_mask_of_each_image(beside: bool) -> None:
    names = [name for name in NAMES if not beside or name[0] not in "cEe"]
    mistakes = Mistakes()
    masks = name_masks(names, Path("m"), [], mistakes, beside=beside)
    assert not mistakes and all(mask.endswith(".png") for mask in masks.values())
    assert find_masks(names, masks.values()) == (masks, ())
    assert len({mask.casefold() for mask in masks.values()}) == len(names), "also where a disk ignores the letter case"
    assert masks["b.jpg"] == ("b-masklabel.png" if beside else "b.png")


def test_names_that_training_would_pair_otherwise_are_mistakes() -> None:
    for names, existing, beside, told in (
        (["a.jpg"], ["a.jpg"], False, f"would use {Path('m/a.jpg')} as the mask of the image a.jpg, not the new a.png"),
        (["a.jpg", "a.png"], [], True, "a.jpg, a.png would have the same mask, a-masklabel.png"),
        (["a.jpg", "a.png"], ["a.png"], False, f"would use {Path('m/a.png')} as the mask of the image a.jpg"),
        (["a.png", "a.jpg", "a.png.bmp"], [], False, "would have the same mask, a.png.png"),
    ):
        mistakes = Mistakes()
        name_masks(names, Path("m"), existing, mistakes, beside=beside)
        assert told in str(list(mistakes)), list(mistakes)


def test_a_mask_is_a_grey_png_that_says_how_it_was_made(tmp_path: Path) -> None:
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    path = tmp_path / "sub" / "a.png"
    write_mask(path, mask, "0a", {"text": ["é"], "blur": 2}, found=True)
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", (4, 3)) and np.array_equal(image, mask)
    record = read_record(path)
    assert record is not None and (record.image, record.settings, record.found) == (
        "0a",
        {"text": ["é"], "blur": 2},
        True,
    )
    assert [path.name for path in path.parent.iterdir()] == ["a.png"]


def test_a_mask_that_was_painted_on_has_no_record(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_mask(path, np.zeros((3, 4), np.uint8), "0a", {}, found=True)
    with Image.open(path) as image:
        text = image.text  # type: ignore[attr-defined]
        image.load()
        image.putpixel((0, 0), 255)
    from PIL.PngImagePlugin import PngInfo

    kept = PngInfo()
    for key, value in text.items():
        kept.add_itxt(key, value)
    image.save(path, pnginfo=kept)  # as a program does that keeps text chunks
    assert read_record(path) is None
    Image.new("L", (4, 3)).save(path)
    assert read_record(path) is None
    path.write_bytes(b"")
    assert read_record(path) is None


def test_a_mask_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.mkdir()
    with pytest.raises(UserError, match="could not be written"):
        write_mask(path, np.zeros((3, 4), np.uint8), "", {}, found=True)
    assert [name.name for name in tmp_path.iterdir()] == ["a.png"]
