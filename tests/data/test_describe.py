"""From the options to datasets: what flags give to files and folders."""

from __future__ import annotations

import json
from pathlib import Path

from library.data.describe import describe
from library.data.scan import scan
from library.options.datasets import Described
from library.options.parse import parse
from tests.data.pictures import save

FILE = "[general]\nresolution = 64\n{general}\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n{subset}\n"


def described(folder: Path, *words: str) -> Described:
    out = ["--output_dir", str(folder), "--pretrained_model_name_or_path", "model", "--resolution", "64"]
    return describe(parse([*out, *words]).options)


def file(folder: Path, subset: str = "", general: str = "") -> str:
    path = folder / "data.toml"
    path.write_text(FILE.format(subset=subset, general=general), encoding="utf-8")
    return str(path)


def test_what_is_set_aside_for_validation_is_not_trained_on(tmp_path: Path) -> None:
    (mistake,) = described(tmp_path, "--dataset_config", file(tmp_path, general="validation_split = 0.1")).mistakes
    assert "validation_split = 0.1 (data.toml, line 4)" in mistake.what


def test_a_metadata_file_of_the_command_line(tmp_path: Path) -> None:
    save(tmp_path / "pictures" / "a.png")
    save(tmp_path / "reg" / "1_dog" / "b.png")
    listed = tmp_path / "meta.json"
    listed.write_text(json.dumps({"a": {"caption": "a dog", "tags": "grass"}}), encoding="utf-8")
    words = ("--train_data_dir", str(tmp_path / "pictures"), "--reg_data_dir", str(tmp_path / "reg"))
    found = described(tmp_path, *words, "--in_json", str(listed), "--dataset_repeats", "3")
    assert not found.mistakes
    records = scan(found.datasets).records
    assert [(r.name, r.caption, r.repeats, r.is_reg) for r in records] == [
        ("a.png", "a dog,grass", 3, False),
        ("b.png", "dog", 3, True),  # balanced
    ]


def test_repeats_of_the_command_line_are_those_that_a_file_leaves_out(tmp_path: Path) -> None:
    repeats = ("--dataset_repeats", "5")
    left_out = described(tmp_path, "--dataset_config", file(tmp_path), *repeats)
    given = described(tmp_path, "--dataset_config", file(tmp_path, subset="num_repeats = 2"), *repeats)
    assert [found.datasets[0].subsets[0].repeats for found in (left_out, given)] == [5, 2]
