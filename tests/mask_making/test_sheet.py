"""The contact sheet: what it shows of each mask, and that no name becomes markup."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data.contact_sheet import page
from library.mask_making.mask_files import write_mask
from library.mask_making.plan import MaskJob
from library.mask_making.sheet import write_sheet


def job(folder: Path, name: str, size: tuple[int, int] = (8, 6), mask: np.ndarray | None = None) -> MaskJob:
    Image.new("RGB", size, (200, 0, 0)).save(folder / name)
    path = folder / f"{name}.mask.png"
    if mask is not None:
        write_mask(path, mask, "", {}, found=True)
    return MaskJob(name, folder / name, size, path)


def test_each_mask_is_shown_with_its_share_and_those_with_remarks_first(tmp_path: Path) -> None:
    half = np.zeros((6, 8), np.uint8)
    half[:, :4] = 255
    entries = [
        (job(tmp_path, "half.png", mask=half), (), ""),
        (job(tmp_path, "white.png", mask=np.full((6, 8), 255, np.uint8)), ("nothing found",), ""),
        (job(tmp_path, "small.png", mask=half[::2, ::2]), ("by hand",), ""),
        (job(tmp_path, "none.png"), (), "its data do not match"),
    ]
    write_sheet(tmp_path / "masks.html", tmp_path, entries)
    text = (tmp_path / "masks.html").read_text(encoding="utf-8")
    order = [text.index(f"<bdi>{name}.png</bdi>") for name in ("white", "small", "none", "half")]
    assert order == sorted(order)
    assert text.count("mask 50 %") == 2 and text.count("mask 100 %") == 1 and "its data do not match" in text
    assert "4 images. Hatched" in text and text.count('class="mask"') == 3


def test_no_name_becomes_markup_and_nothing_is_fetched_or_run(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)> & \"'.png"
    write_sheet(tmp_path / "masks.html", tmp_path / "<b>", [(job(tmp_path, name), ("<i>",), "<u>")])
    text = (tmp_path / "masks.html").read_text(encoding="utf-8")
    assert "<img src=x" not in text and "<b>Cannot" in text and "<i>" not in text and "<u>" not in text
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in text and "<script" not in text


def test_of_many_masks_a_selection_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MOST_SHOWN", 4)
    white = np.full((6, 8), 255, np.uint8)
    entries = [
        (job(tmp_path, f"{number}.png", mask=white), ("nothing found",) * (number == 9), "") for number in range(10)
    ]
    write_sheet(tmp_path / "masks.html", tmp_path, entries)
    text = (tmp_path / "masks.html").read_text(encoding="utf-8")
    assert "10 images, 4 of them shown" in text and text.index("<bdi>9.png") < text.index("<bdi>0.png")
