"""Datasets from options: the flags' defaults for files and folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.data.scan.dataset_specs import cache_folder, describe
from library.data.scan.scan import scan
from library.options.datasets import ParsedDatasets
from library.options.groups.dataset import DatasetOptions
from library.options.parse import parse
from library.options.train_options import TrainOptions
from tests.data.image_files import save

FILE = "[general]\nresolution = 64\n{general}\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n{subset}\n"


def described(folder: Path, *words: str) -> ParsedDatasets:
    out = ["--output_dir", str(folder), "--pretrained_model_name_or_path", "model", "--resolution", "64"]
    return describe(parse([*out, *words]).options)


def file(folder: Path, subset: str = "", general: str = "") -> str:
    path = folder / "data.toml"
    path.write_text(FILE.format(subset=subset, general=general), encoding="utf-8")
    return str(path)


def test_a_file_may_say_what_is_set_aside_otherwise_the_flags_do(tmp_path: Path) -> None:
    words = ("--validation_split", "0.25", "--validation_seed", "3")
    by_flag = described(tmp_path, "--dataset_config", file(tmp_path), *words)
    by_file = described(tmp_path, "--dataset_config", file(tmp_path, general="validation_split = 0.5"), *words)
    chosen = [found.datasets[0] for found in (by_flag, by_file)]
    assert [(each.validation_split, each.validation_seed) for each in chosen] == [(0.25, 3), (0.5, 3)]
    save(tmp_path / "1_dog" / "a.png")
    (of_folders,) = described(tmp_path, "--train_data_dir", str(tmp_path), *words).datasets
    assert (of_folders.validation_split, of_folders.validation_seed) == (0.25, 3)


def test_a_metadata_file_of_the_command_line(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png")
    save(tmp_path / "reg" / "1_dog" / "b.png")
    listed = tmp_path / "meta.json"
    listed.write_text(json.dumps({"a": {"caption": "a dog", "tags": "grass"}}), encoding="utf-8")
    words = ("--train_data_dir", str(tmp_path / "images"), "--reg_data_dir", str(tmp_path / "reg"))
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


def options(*flags: object) -> TrainOptions:
    return parse(list(map(str, flags))).options


def test_what_is_remembered_lies_with_the_user_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder(DatasetOptions(data_cache_dir=Path("here"))) == Path("here")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder(DatasetOptions()) == Path("/cache/dreamfolder")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("LOCALAPPDATA", "/windows")
    assert cache_folder(DatasetOptions()) == Path("/windows/dreamfolder")
    monkeypatch.delenv("LOCALAPPDATA")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder(DatasetOptions()) == Path("/home/me/.cache/dreamfolder")


def test_flags_reach_the_records(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    found = describe(
        options(
            *("--train_data_dir", tmp_path, "--class_tokens", "sks dog", "--num_repeats", 10, "--resolution", "64,128"),
            *("--train_batch_size", 3, "--caption_extension", ".txt,.caption", "--caption_prefix", "a photo of"),
            *(
                "--flip_aug",
                "--alpha_color",
                "#102030",
                "--face_crop_aug_range",
                "2.0,4.0",
                "--caption_encoding",
                "cp1251",
            ),
        )
    )
    (dataset,) = found.datasets
    (subset,) = dataset.subsets
    assert found.mistakes == () and dataset.batch_size == 3 and dataset.buckets.resolution == (64, 128)
    assert (subset.image_dir, subset.class_tokens, subset.repeats) == (tmp_path, "sks dog", 10)
    assert (subset.caption_extensions, subset.caption_encoding) == ((".txt", ".caption"), "cp1251")
    assert subset.captions.prefix == "a photo of"
    assert subset.images.flip and subset.images.background == (16, 32, 48) and subset.images.face_crop == (2.0, 4.0)


def test_masks_are_read_only_where_they_are_asked_for(tmp_path: Path) -> None:
    save(tmp_path / "1_dog" / "a.png")
    flags = ("--train_data_dir", tmp_path, "--resolution", 64, "--conditioning_data_dir", tmp_path / "masks")
    (without,) = describe(options(*flags)).datasets
    assert without.subsets[0].mask_dir is None
    found = describe(options(*flags, "--masked_loss"))
    assert ["no folder" in mistake.what for mistake in found.mistakes] == [True]
    assert not scan(found.datasets).mistakes  # told once
    (tmp_path / "masks").touch()
    (mistake,) = describe(options(*flags, "--masked_loss")).mistakes
    assert mistake.what == f"--conditioning_data_dir: {tmp_path / 'masks'} is a file, not a folder"


def test_every_faulty_value_is_told(tmp_path: Path) -> None:
    save(tmp_path / "1_dog" / "a.png")
    flags = ("--train_data_dir", tmp_path, "--resolution", 64, "--alpha_color", "white", "--caption_encoding", "base64")
    told = [mistake.what for mistake in describe(options(*flags)).mistakes]
    assert len(told) == 2 and "--alpha_color" in told[0] and "--caption_encoding" in told[1]
