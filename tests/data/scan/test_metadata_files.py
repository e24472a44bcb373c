"""Metadata files: their images and captions (formats: fine-tuning metadata)."""

from __future__ import annotations

import json
import ntpath
import os
from pathlib import Path
from typing import Any

import pytest

from library.data.scan.listing import is_below
from library.data.scan.metadata_files import join, read_metadata
from library.data.scan.scan import Scan, scan
from library.options.datasets import CaptionSettings
from library.options.mistakes import UserError
from tests.data.image_files import dataset, save, subset

NO_SCORES = ["good", "", True, [], {}, -0.1, 10.5, "11", float("nan"), "inf", 10**400]


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".jsonl":
        text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in content)
    else:
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    return path


def run(file: Path, folder: Path | None, **values: Any) -> Scan:
    return scan([dataset(subset(folder, metadata_file=file, caption_source="metadata", **values))])


def told(found: Scan) -> str:
    return "\n".join(str(mistake) for mistake in found.mistakes)


def test_both_forms_mean_the_same(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg", "sub/c.webp"):
        save(tmp_path / "x" / name)
    entries = {
        "a.png": {"caption": "a dog", "tags": "1dog, 犬"},
        "b.jpg": {"tags": "cat", "image_size": [1, 1]},
        "sub/c.webp": {"caption": "a bird"},
    }
    lines = [{"image_path": key, **entry} for key, entry in entries.items()]
    for file in (write(tmp_path / "m.json", entries), write(tmp_path / "m.jsonl", [lines[0], "", *lines[1:]])):
        found = run(file, tmp_path / "x")
        assert not found.mistakes and not found.bad_images
        assert [(r.folder, r.name, r.caption, r.from_file, r.size) for r in found.records] == [
            (tmp_path / "x", "a.png", "a dog,1dog, 犬", True, (64, 48)),
            (tmp_path / "x", "b.jpg", "cat", True, (64, 48)),
            (tmp_path / "x", "sub/c.webp", "a bird", True, (64, 48)),
        ]


def test_absolute_paths(tmp_path: Path) -> None:
    inside, outside = save(tmp_path / "x" / "a.png"), save(tmp_path / "y" / "b.png")
    file = write(tmp_path / "m.json", {str(inside): {"caption": "in"}, str(outside): {"caption": "out"}})
    assert [(r.path, r.key, r.caption) for r in run(file, None).records] == [
        (inside, "train/x/a.png", "in"),
        (outside, "train/y/b.png", "out"),
    ]


@pytest.mark.parametrize(
    "key", ["../y/b.png", "sub/../../y/b", "{y}/b.png", "..\\y\\b.png", "y/b.png", "link/../../y/b.png"]
)
def test_no_image_outside_of_a_folder_that_is_given(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A metadata file may be from anywhere, and would otherwise decide which files of this machine are trained on, and
    where caches are written. "y/b.png": relative to the current folder, as sd-scripts' tools write it."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "y" / "b.png")
    for index in range(20):
        save(tmp_path / "x" / f"{index}.png")
    keys = [key.format(y=tmp_path / "y"), *(f"{index}.png" for index in range(20))]
    found = run(write(tmp_path / "m.json", {name: {"caption": "a"} for name in keys}), tmp_path / "x")
    assert len(found.records) == 20 and len(found.bad_images) == 1
    ((_, why),) = found.bad_images
    assert "it is outside of" in why and str(tmp_path / "x") in why or "does not exist" in why
    if key not in ("y/b.png", "..\\y\\b.png"):
        assert "set no folder of images to allow any path" in why


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_a_link_in_the_folder_is_the_users_own(tmp_path: Path) -> None:
    save(tmp_path / "disk" / "a.png")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "more").symlink_to(tmp_path / "disk")
    (tmp_path / "linked").symlink_to(tmp_path / "x")
    entries = {"more/a.png": {"caption": "a"}}
    assert len(run(write(tmp_path / "m.json", entries), tmp_path / "x").records) == 1
    real = {str(save(tmp_path / "x" / "b.png")): {"caption": "b"}}
    assert len(run(write(tmp_path / "r.json", real), tmp_path / "linked").records) == 1


@pytest.mark.parametrize(
    ("path", "root", "below"),
    [
        ("C:\\x\\a", "C:\\x", True), ("c:\\X\\a", "C:\\x", True), ("D:\\x\\a", "C:\\x", False),
        ("\\\\server\\share\\a", "C:\\x", False), ("C:\\x\\..\\y", "C:\\x", False), ("C:\\xy\\a", "C:\\x", False),
        ("\\\\server\\other\\a", "\\\\server\\share", False), ("C:a", "D:\\x", False), ("C:/x/a", "C:\\x", True),
    ],
)  # fmt: skip
def test_drives_and_shares_of_windows(path: str, root: str, below: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(name: str) -> str:
        assert not name.startswith("\\\\"), "looking at a share sends the user's credentials to its server"
        return name

    monkeypatch.setattr(ntpath, "realpath", asked)
    assert is_below(path, root, ntpath) is below


def test_keys_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As sd-scripts writes them with --full_path for a relative folder. A bare name is always one of the folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("x/a.png", "x/y/b.png", "c.png"):
        save(tmp_path / name)
    keys = ("x/a.png", "x\\y\\b", *(f"x/{index}.png" for index in range(20)), "c")
    for key in keys[2:-1]:
        save(tmp_path / key)
    found = run(write(tmp_path / "m.json", {key: {"caption": key} for key in keys}), Path("x"))
    captions = {record.path.name: record.caption for record in found.records}
    assert captions["a.png"] == "x/a.png" and captions["b.png"] == "x\\y\\b" and len(captions) == 22
    assert [path.name for path, _ in found.bad_images] == ["c"]


def test_keys_without_ending_and_with_backslashes(tmp_path: Path) -> None:
    for name in ("a.png", "sub/b.v2.jpg", "sub/c.png", "twice.png", "twice.jpg"):
        save(tmp_path / "x" / name)
    for index in range(20):
        save(tmp_path / "x" / f"{index}.png")
    keys = ["a", "sub/b.v2", "sub\\c.png", "twice", *(f"{index}.png" for index in range(20))]
    found = run(write(tmp_path / "m.json", {key: {"caption": key} for key in keys}), tmp_path / "x")
    named = {record.name: record.caption for record in found.records}
    assert (named["a.png"], named["sub/b.v2.jpg"], named["sub/c.png"]) == ("a", "sub/b.v2", "sub\\c.png")
    ((path, why),) = found.bad_images
    assert path.name == "twice" and "it may be twice.jpg or twice.png" in why and not found.mistakes


def test_listed_images_that_are_not_there_stop_the_run(tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png")
    file = write(tmp_path / "m.json", {"a.png": {"caption": "a"}, "b.png": {"caption": "b"}, "no/c.png": {}})
    assert "b.png: listed in m.json, but it does not exist" in told(run(file, tmp_path / "x"))
    relative = run(file, None)
    assert "its path is not absolute" in told(relative)


def test_images_that_are_not_listed_and_twice_listed_are_told(tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path / "x" / f"{name}.png")
    lines = [{"image_path": "a.png", "caption": "1"}, {"image_path": "a.png", "caption": "2"}, {"image_path": "a"}]
    found = run(write(tmp_path / "m.jsonl", lines), tmp_path / "x", class_tokens="dog")
    assert [record.caption for record in found.records] == ["2"]
    notes = "\n".join(found.notes)
    assert "2 images listed twice, used once" in notes and "2 images not listed in m.jsonl" in notes


def test_scores_are_those_of_the_image_else_of_the_subset(tmp_path: Path) -> None:
    for name in "abcdef":
        save(tmp_path / "x" / f"{name}.png")
    scores: dict[str, Any] = {"a": 6.5, "b": " 4.25 ", "c": 0, "d": None, "e": 10}
    entries = {name: {"caption": name, "aesthetic_score": score} for name, score in scores.items()} | {"f": {}}
    lines = [{"image_path": "f", "aesthetic_score": 1}, *({"image_path": key, **own} for key, own in entries.items())]
    for file in (write(tmp_path / "m.json", entries), write(tmp_path / "m.jsonl", lines)):
        for of_subset in (None, 3.0):
            found = run(file, tmp_path / "x", score=of_subset)
            assert not found.mistakes
            assert [record.score for record in found.records] == [6.5, 4.25, 0.0, of_subset, 10.0, of_subset]


def test_an_edited_score_is_seen_by_the_next_scan(tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png")
    for score in (2.0, 8.0):
        file = write(tmp_path / "m.json", {"a.png": {"aesthetic_score": score}})
        described = dataset(subset(tmp_path / "x", metadata_file=file, caption_source="metadata"))
        assert [record.score for record in scan([described], tmp_path / "index").records] == [score]


def test_a_image_without_words_has_the_class_or_nothing(tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png")
    file = write(tmp_path / "m.json", {"a.png": {}})
    assert [(r.caption, r.from_file) for r in run(file, tmp_path / "x", class_tokens="dog").records] == [("dog", False)]
    empty = run(file, tmp_path / "x")
    assert f"1 image without a caption or tags in {tmp_path / 'm.json'}, so an empty caption" in "\n".join(empty.notes)


@pytest.mark.parametrize(
    ("caption", "tags", "wildcard", "expected"),
    [
        ("a", "b", False, "a;b"),
        ("", "b", False, "b"),
        ("a", "", False, "a"),
        ("a\nb", "c", False, "a b;c"),
        ("a\n\nb", "c\nd", True, "a;c;d\nb;c;d"),
        ("", "c\nd", True, "c;d"),
        ("a\nb", "", True, "a\nb"),
    ],
)
def test_caption_and_tags_are_joined(caption: str, tags: str, wildcard: bool, expected: str) -> None:
    assert join(caption, tags, CaptionSettings(separator=";", wildcard=wildcard)) == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.txt", "{}", ["neither .json nor .jsonl"]),
        ("m.json", "{'a': 1}", ["not valid JSON"]),
        ("m.json", "[]", ["not an object of images"]),
        ("m.json", {"a.png": "words", "b.png": {"caption": 5}}, ["'a.png' is not an object", "caption of 'b.png'"]),
        (
            "m.json",
            {str(place): {"aesthetic_score": value} for place, value in enumerate(NO_SCORES)},
            [f"aesthetic_score of '{place}' is" for place in range(len(NO_SCORES))],
        ),
        ("m.jsonl", ["{", {"caption": "x"}, {"image_path": "a", "tags": 1}], ["line 1", "line 2", "line 3"]),
    ],
)
def test_all_that_is_wrong_is_told_with_its_place(tmp_path: Path, name: str, content: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        read_metadata(write(tmp_path / name, content), CaptionSettings())
    assert len(raised.value.mistakes) == len(words)
    assert all(word in str(raised.value) for word in words)


def test_files_that_are_missing_empty_or_in_another_encoding(tmp_path: Path) -> None:
    assert "cannot be read" in told(run(tmp_path / "none.json", tmp_path))
    assert "lists no image" in told(run(write(tmp_path / "empty.json", {}), tmp_path))
    (tmp_path / "m.json").write_bytes('{"a": {"caption": "grün"}}'.encode("latin-1"))
    assert "not in UTF-8" in told(run(tmp_path / "m.json", tmp_path))
    (tmp_path / "m.json").write_bytes(b"\xef\xbb\xbf{}")
    assert "lists no image" in told(run(tmp_path / "m.json", tmp_path))
    assert "there is no folder" in told(run(write(tmp_path / "m.json", {"a": {}}), tmp_path / "none"))
    assert "m.json is a file (" in told(run(write(tmp_path / "m.json", {"a": {}}), tmp_path / "m.json"))
