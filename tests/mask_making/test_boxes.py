"""Lists of boxes: what is read, and every mistake in them."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from library.mask_making.boxes import check_boxes, read_boxes
from library.options.mistakes import Mistakes


def write(folder: Path, content: Any) -> Path:
    path = folder / "boxes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_boxes_are_read_in_whole_pixels_by_the_name_of_their_image(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "é.png")
    path = write(tmp_path, {"a b/x'\".png": [[1, 2, 30, 40], [0.4, 0.6, 7.5, 9]], decomposed: []})
    mistakes = Mistakes()
    assert read_boxes(path, mistakes) == {"a b/x'\".png": ((1, 2, 30, 40), (0, 1, 8, 9)), "é.png": ()}
    assert not mistakes


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[1, 2", "is not valid JSON"),
        ([1], "is not an object"),
        ({"a.png": [1, 2, 3, 4]}, "1 is not a box of a.png"),
        ({"a.png": [[1, 2, 3]]}, "[1, 2, 3] is not a box of a.png"),
        ({"a.png": [[3, 2, 3, 4]]}, "[3, 2, 3, 4] is not a box of a.png"),
        ({"a.png": [[1, 2, "x", 4]]}, '[1, 2, "x", 4] is not a box of a.png'),
        ('{"a.png": [[1, 2, 1e999, 4]]}', "is not a box of a.png"),
        ({"a.png": None}, "null is not a box of a.png"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_what_is_no_box_is_a_mistake(content: Any, told: str, tmp_path: Path) -> None:
    mistakes = Mistakes()
    read_boxes(write(tmp_path, content), mistakes)
    assert [told in mistake.what for mistake in mistakes] == [True]


def test_a_missing_file_is_a_mistake(tmp_path: Path) -> None:
    mistakes = Mistakes()
    assert read_boxes(tmp_path / "none.json", mistakes) == {} and len(mistakes) == 1


def test_boxes_without_an_image_or_outside_of_it_are_mistakes() -> None:
    mistakes = Mistakes()
    boxes = {
        "a.png": [(0, 0, 5, 5), (10, 0, 12, 5), (-4, -4, 0, 9)],
        "b.png": [(0, 0, 1, 1)],
        "c.png": [(9, 9, 20, 20)],
    }
    check_boxes(Path("boxes.json"), boxes, {"a.png": (10, 8)}, mistakes)
    told = [mistake.what for mistake in mistakes]
    assert len(told) == 3
    assert "not in the folder: b.png" in told[0]
    assert "[10, 0, 12, 5] is outside of a.png, 10x8" in told[1] and "[-4, -4, 0, 9]" in told[2]
