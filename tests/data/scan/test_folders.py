"""Folders with repeats become subsets, and the others are reported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from library.data.scan.folders import folder_datasets, plain_folder
from library.options.datasets import CaptionSettings, ParsedDatasets
from tests.data.image_files import save, template


def told(described: ParsedDatasets) -> str:
    return "\n".join(str(mistake) for mistake in described.mistakes)


def test_folders_are_sorted_and_say_repeats_and_class(tmp_path: Path) -> None:
    for name in ("3_sks_two dog", "10_sks dog", "7"):
        (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "reg" / "1_dog").mkdir(parents=True)
    settings = template(captions=CaptionSettings(shuffle=True), caption_extensions=(".cap",))
    described = folder_datasets(tmp_path / "train", tmp_path / "reg", settings)
    (dataset,) = described.datasets
    assert not described.mistakes and not described.notes
    assert [(s.image_dir, s.repeats, s.class_tokens, s.is_reg, s.origin) for s in dataset.subsets] == [
        (tmp_path / "train" / "10_sks dog", 10, "sks dog", False, "--train_data_dir"),
        (tmp_path / "train" / "3_sks_two dog", 3, "sks_two dog", False, "--train_data_dir"),
        (tmp_path / "train" / "7", 7, "", False, "--train_data_dir"),
        (tmp_path / "reg" / "1_dog", 1, "dog", True, "--reg_data_dir"),
    ]
    assert all(s.captions.shuffle and s.caption_extensions == (".cap",) for s in dataset.subsets)
    assert dataset.buckets is settings.buckets


@pytest.mark.parametrize("name", ["x_10", "10 foo", "1.5_x", "+3_x", "-3_x", "0_x", "٣_x", ".git"])
def test_every_skipped_folder_is_told(tmp_path: Path, name: str) -> None:
    for folder in ("1_a", name):
        (tmp_path / folder).mkdir()
    described = folder_datasets(tmp_path, None, template())
    assert not described.mistakes and len(described.datasets[0].subsets) == 1
    (note,) = described.notes
    assert str(tmp_path / name) in note and "skipped folder" in note


@pytest.mark.parametrize("name", ["20240131_dog", "20240131"])
def test_a_date_is_no_number_of_repeats(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert "would be repeated 20240131 times" in told(folder_datasets(tmp_path, None, template()))


def test_no_folder_is_a_mistake_with_the_way_out(tmp_path: Path) -> None:
    assert "--train_data_dir is not set" in told(folder_datasets(None, None, template()))
    assert "there is no folder" in told(folder_datasets(tmp_path / "missing", None, template()))
    save(tmp_path / "10_sks dog" / "a.png")
    assert f"--train_data_dir={tmp_path}" in told(folder_datasets(tmp_path / "10_sks dog", None, template()))
    save(tmp_path / "a.png")
    beside = folder_datasets(tmp_path, None, template())
    assert not beside.mistakes and "1 image directly in" in beside.notes[0]
    shutil.rmtree(tmp_path / "10_sks dog")
    alone = folder_datasets(tmp_path, None, template())
    assert "but 1 image" in told(alone) and "--class_tokens" in told(alone) and not alone.datasets


def test_regularisation_needs_folders_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "train" / "1_a").mkdir(parents=True)
    (tmp_path / "reg").mkdir()
    assert "--reg_data_dir" in told(folder_datasets(tmp_path / "train", tmp_path / "reg", template()))
    same = folder_datasets(tmp_path / "train", tmp_path / "reg" / ".." / "train", template())
    assert "same folder" in told(same)


def test_a_plain_folder_is_one_subset(tmp_path: Path) -> None:
    save(tmp_path / "dogs" / "a.png")
    (tmp_path / "reg" / "1_dog").mkdir(parents=True)
    described = plain_folder(tmp_path / "dogs", template(), "sks dog", 10, tmp_path / "reg")
    assert not described.mistakes
    assert [(s.image_dir, s.repeats, s.class_tokens, s.is_reg) for s in described.datasets[0].subsets] == [
        (tmp_path / "dogs", 10, "sks dog", False),
        (tmp_path / "reg" / "1_dog", 1, "dog", True),
    ]


def test_a_plain_folder_that_is_none(tmp_path: Path) -> None:
    assert "there is no folder" in told(plain_folder(tmp_path / "none", template(), "sks dog", 10))
    (tmp_path / "10_dog").mkdir()
    assert "folders with repeats, like 10_dog" in told(plain_folder(tmp_path, template(), "sks dog", 10))
