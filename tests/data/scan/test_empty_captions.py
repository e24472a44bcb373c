"""A run whose captions are all empty is a mistake, unless it is asked for by --caption_dropout_rate 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from library.data.scan.scan import Scan, scan
from library.options.datasets import CaptionSettings
from tests.data.image_files import dataset, save, subset


def told(found: Scan) -> str:
    return "\n".join(str(mistake) for mistake in found.mistakes)


def write_metadata(folder: Path, *entries: dict[str, Any], lines: bool = False) -> Path:
    for number in range(len(entries)):
        save(folder / "x" / f"{number}.png")
    if lines:
        text = "\n".join(json.dumps({"image_path": f"{number}.png", **each}) for number, each in enumerate(entries))
    else:
        text = json.dumps({f"{number}.png": each for number, each in enumerate(entries)})
    file = folder / ("m.jsonl" if lines else "m.json")
    file.write_text(text, encoding="utf-8")
    return file


def listed(file: Path, **values: Any) -> Scan:
    return scan([dataset(subset(file.parent / "x", metadata_file=file, caption_source="metadata", **values))])


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("tokens", [None, "x"])
@pytest.mark.parametrize("name", ["text", "prompt", "Caption", "TAGS", "description"])
def test_captions_under_another_name_are_a_mistake(tmp_path: Path, name: str, tokens: str | None, lines: bool) -> None:
    file = write_metadata(tmp_path, {name: "a dog"}, {name: "a cat"}, {"caption": "a bird"}, lines=lines)
    said = told(listed(file, class_tokens=tokens))
    assert f'1 of 3 images with "caption" or "tags", 2 with "{name}"' in said and f'rename "{name}"' in said


def test_a_few_other_keys_are_no_mistake(tmp_path: Path) -> None:
    entries = [{"text": "a dog"}, {"caption": "a cat", "text": "x"}, {"tags": "bird", "prompt": "x"}]
    found = listed(write_metadata(tmp_path, *entries))
    assert not found.mistakes and any("1 image with an empty caption" in note or "1 image without" in note
                                      for note in found.notes)  # fmt: skip


def test_metadata_without_any_caption_is_a_mistake(tmp_path: Path) -> None:
    found = listed(write_metadata(tmp_path, {"image_size": [64, 48]}, {}))
    assert "2 training images, all with an empty caption" in told(found)
    assert not listed(tmp_path / "m.json", class_tokens="dog").mistakes


@pytest.mark.parametrize("caption", [None, ""])
def test_no_caption_at_all_is_a_mistake_with_the_ways_out(tmp_path: Path, caption: str | None) -> None:
    for name in ("a.png", "b.png"):
        save(tmp_path / "x" / name, caption=caption)
    said = told(scan([dataset(subset(tmp_path / "x"))]))
    assert "2 training images, all with an empty caption in every epoch" in said
    assert ".txt file" in said and "set class_tokens (data.toml, line 1)" in said and "--caption_dropout_rate 1" in said
    assert ("delete the empty files" in said) == (caption is not None)


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        (CaptionSettings(dropout_every_n_epochs=1), "caption_dropout_every_n_epochs = 1 (data.toml, line 1)"),
        (CaptionSettings(dropout_every_n_epochs=1, prefix="x"), "set it to 2 or more"),
        (CaptionSettings(tag_dropout_rate=1), "caption_tag_dropout_rate = 1"),
    ],
)
def test_settings_that_empty_every_caption_are_a_mistake(tmp_path: Path, settings: CaptionSettings, flag: str) -> None:
    save(tmp_path / "x" / "a.png", caption="a dog, outside")
    said = told(scan([dataset(subset(tmp_path / "x", captions=settings))]))
    assert flag in said and "1 training image, all with an empty caption" in said


@pytest.mark.parametrize(
    "settings",
    [
        CaptionSettings(dropout_rate=1),
        CaptionSettings(dropout_rate=1, dropout_every_n_epochs=1),
        CaptionSettings(dropout_every_n_epochs=2),
        CaptionSettings(tag_dropout_rate=1, keep_tokens=1),
        CaptionSettings(tag_dropout_rate=0.9),
    ],
)
def test_what_was_asked_for_or_leaves_captions_is_none(tmp_path: Path, settings: CaptionSettings) -> None:
    save(tmp_path / "x" / "a.png", caption="a dog, outside")
    assert not scan([dataset(subset(tmp_path / "x", captions=settings))]).mistakes


def test_one_caption_a_prefix_or_other_images_are_enough(tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png", caption="")
    assert not scan([dataset(subset(tmp_path / "x", captions=CaptionSettings(prefix="sks")))]).mistakes
    save(tmp_path / "y" / "b.png", caption="a dog")
    dropped = subset(tmp_path / "x", captions=CaptionSettings(dropout_every_n_epochs=1))
    assert not scan([dataset(dropped, subset(tmp_path / "y"))]).mistakes
    said = told(scan([dataset(subset(tmp_path / "x"), subset(tmp_path / "y", is_reg=True))]))
    assert "1 training image, all with an empty caption" in said
