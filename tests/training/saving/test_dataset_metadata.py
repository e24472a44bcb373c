"""What an adapter's file says about the images, by the shapes that sd-scripts writes and counts done by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from library.options.parse import parse
from library.training.plan.plan import Plan, decide
from library.training.saving.dataset_metadata import dataset_metadata, largest_resolution
from tests import tiny
from tests.training.running import World, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """3 images x 2 of 80 x 64, 2 x 1 of 64 x 96, and 3 of regularisation, of 64 x 64."""
    return make_world(tmp_path_factory.mktemp("world"))


def plan_of(world: World, out: Path, **flags: object) -> Plan:
    return decide(parse(world.arguments(out, **flags)))


def read(plan: Plan) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in dataset_metadata(plan.facts.options, plan.facts.images).items()}


def test_folders(world: World, tmp_path: Path) -> None:
    assert read(plan_of(world, tmp_path, reg_data_dir=world.root / "reg")) == {
        "ss_dataset_dirs": {
            "2_sks dog": {"n_repeats": 2, "img_count": 3},
            "1_zwx cat": {"n_repeats": 1, "img_count": 2},
        },
        "ss_reg_dataset_dirs": {"1_dog": {"n_repeats": 1, "img_count": 3}},
        "ss_tag_frequency": {
            "2_sks dog": {"a photo of sks dog": 1, "grass": 1, "sky": 1, "sun": 1, "sks dog": 2},
            "1_zwx cat": {"zwx cat": 2},
            "1_dog": {"dog": 3},
        },
        "ss_bucket_info": None,
    }


def test_buckets_are_counted_with_repeats(world: World, tmp_path: Path) -> None:
    # of all sizes of 64 x 64 = 4096 pixels in steps of 64 there is one, so that every image lands in it: the
    # aspects are off by 80/64 - 1 for three images and by 1 - 64/96 for two
    flags = {"enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 128}
    info = read(plan_of(world, tmp_path, **flags))["ss_bucket_info"]
    assert info["buckets"] == {"0": {"resolution": [64, 64], "count": 3 * 2 + 2}}
    assert info["mean_img_ar_error"] == pytest.approx((3 * 0.25 + 2 / 3) / 5)
    info = read(plan_of(world, tmp_path, resolution=128, **flags))["ss_bucket_info"]
    # 64x128 for 64x96 (0.667: off by 0.167, 128x128 by 0.333); 128x128 for 80x64 (1.25: off by 0.25)
    assert info["buckets"] == {
        "0": {"resolution": [64, 128], "count": 2},
        "1": {"resolution": [128, 128], "count": 6},
    }
    assert info["mean_img_ar_error"] == pytest.approx((3 * 0.25 + 2 * (64 / 96 - 0.5)) / 5)


TOML = """
[[datasets]]
resolution = 64
batch_size = 2
caption_extension = ".txt"
keep_tokens = 1
  [[datasets.subsets]]
  image_dir = '{root}/train/2_sks dog'
  num_repeats = 2
  shuffle_caption = true
  flip_aug = true
  caption_prefix = "zwx"
  secondary_separator = ";"
  class_tokens = "sks dog"
  [[datasets.subsets]]
  image_dir = '{root}/reg/1_dog'
  is_reg = true
  class_tokens = "dog"
[[datasets]]
resolution = [128, 64]
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 192
resize_interpolation = "bicubic"
caption_extension = ".txt"
  [[datasets.subsets]]
  image_dir = '{root}/train/2_sks dog'
  color_aug = true
  class_tokens = "ignored here, as this folder is counted once"
[[datasets]]
resolution = 64
  [[datasets.subsets]]
  image_dir = '{root}/train/1_zwx cat'
  metadata_file = '{root}/meta cat.json'
"""


def write_datasets(world: World, folder: Path) -> Path:
    names = [f"image_0{number}.png" for number in range(2)]
    meta = {name: {"caption": "a cat", "tags": f"blue, {name}"} for name in names}
    (world.root / "meta cat.json").write_text(json.dumps(meta), encoding="utf-8")
    file = folder / "data.toml"
    file.write_text(TOML.format(root=world.root.as_posix()), encoding="utf-8")
    return file


def test_a_file_of_datasets(world: World, tmp_path: Path) -> None:
    plan = plan_of(
        world, tmp_path, dataset_config=write_datasets(world, tmp_path), train_data_dir=None, resolution=None
    )
    found = read(plan)
    dog_tags = {"a photo of sks dog": 1, "grass": 1, "sky": 1, "sun": 1, "sks dog": 2}
    cat_tags = {"a cat": 2, "blue": 2, "image_00.png": 1, "image_01.png": 1}
    assert found.keys() == {"ss_datasets", "ss_dataset_dirs", "ss_tag_frequency"}
    assert found["ss_dataset_dirs"] == {
        "2_sks dog": {"n_repeats": 2, "img_count": 3},
        "2_sks dog (2)": {"n_repeats": 1, "img_count": 3},
        "meta cat.json": {"n_repeats": 1, "img_count": 2},
    }
    assert found["ss_tag_frequency"] == {"2_sks dog": dog_tags, "1_dog": {"dog": 3}, "meta cat.json": cat_tags}
    first, second, third = found["ss_datasets"]
    dog, reg = first.pop("subsets")
    assert first == {
        "is_dreambooth": True,
        "batch_size_per_device": 2,
        "num_train_images": 6,
        "num_reg_images": 6,  # 3 images, balanced to what is trained
        "resolution": [64, 64],
        "enable_bucket": False,
        "min_bucket_reso": None,
        "max_bucket_reso": None,
        "tag_frequency": {"2_sks dog": dog_tags, "1_dog": {"dog": 3}},
        "bucket_info": None,
        "resize_interpolation": None,
    }
    assert dog == {
        "img_count": 3,
        "num_repeats": 2,
        "color_aug": False,
        "flip_aug": True,
        "random_crop": False,
        "shuffle_caption": True,
        "keep_tokens": 1,
        "keep_tokens_separator": "",
        "secondary_separator": ";",
        "enable_wildcard": False,
        "caption_prefix": "zwx",
        "caption_suffix": None,
        "resize_interpolation": None,
        "image_dir": "2_sks dog",
        "class_tokens": "sks dog",
        "is_reg": False,
    }
    assert (reg["image_dir"], reg["class_tokens"], reg["is_reg"], reg["img_count"]) == ("1_dog", "dog", True, 3)
    assert (second["enable_bucket"], second["min_bucket_reso"], second["max_bucket_reso"]) == (True, 64, 192)
    assert second["resize_interpolation"] == second["subsets"][0]["resize_interpolation"] == "bicubic"
    assert second["bucket_info"]["buckets"] == {"0": {"resolution": [64, 64], "count": 3}}
    assert second["subsets"][0]["color_aug"] is True
    assert third["is_dreambooth"] is False and third["subsets"][0]["metadata_file"] == "meta cat.json"
    assert third["subsets"][0]["image_dir"] == "1_zwx cat"
    assert not {"class_tokens", "is_reg"} & set(third["subsets"][0])
    assert largest_resolution(plan.facts.images) == (128, 64)


def test_a_metadata_file_of_the_command_line(world: World, tmp_path: Path) -> None:
    write_datasets(world, tmp_path)
    flags = {"in_json": world.root / "meta cat.json", "train_data_dir": world.root / "train" / "1_zwx cat"}
    found = read(plan_of(world, tmp_path, **flags, dataset_repeats=3))
    assert found["ss_dataset_dirs"] == {"meta cat.json": {"n_repeats": 3, "img_count": 2}}
    assert found["ss_tag_frequency"]["meta cat.json"]["blue"] == 2


def test_names_are_those_of_the_folders_however_they_are_named(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_images(tmp_path / "犬 dög", 1)
    monkeypatch.chdir(tmp_path / "犬 dög")
    found = read(plan_of(world, tmp_path / "out", train_data_dir=".", class_tokens="dog", num_repeats=2))
    assert found["ss_dataset_dirs"] == {"犬 dög": {"n_repeats": 2, "img_count": 1}}
    assert found["ss_tag_frequency"] == {"犬 dög": {"dog": 1}}


def test_held_out_images_are_not_counted(world: World, tmp_path: Path) -> None:
    flags = {"enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 128, "validation_split": 0.34}
    plan = plan_of(world, tmp_path, **flags)
    assert len(plan.facts.images.scan.held_out) == 1  # of 3; a third of 2 images is less than one
    found = read(plan)
    assert found["ss_dataset_dirs"]["2_sks dog"] == {"n_repeats": 2, "img_count": 2}
    assert sum(found["ss_tag_frequency"]["2_sks dog"].values()) in (2, 5)
    assert found["ss_bucket_info"]["buckets"]["0"]["count"] == 2 * 2 + 2


def test_two_folders_of_one_name_have_their_own_tags(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    (world.root / "reg" / "1_dog").rename(world.root / "reg" / "2_sks dog")
    found = read(plan_of(world, tmp_path / "out", reg_data_dir=world.root / "reg"))
    assert list(found["ss_dataset_dirs"]) == ["1_zwx cat", "2_sks dog"]
    assert found["ss_reg_dataset_dirs"] == {"2_sks dog (2)": {"n_repeats": 2, "img_count": 3}}
    assert found["ss_tag_frequency"] == {
        "2_sks dog": {"a photo of sks dog": 1, "grass": 1, "sky": 1, "sun": 1, "sks dog": 2},
        "1_zwx cat": {"zwx cat": 2},
        "2_sks dog (2)": {"sks dog": 3},
    }


def test_two_folders_of_one_name_in_a_file_of_datasets(tmp_path: Path) -> None:
    """Each has its tags; one folder in two datasets is counted once, with the first."""
    parts = []
    for name, count, tokens in (("a", 1, "cat"), ("b", 2, "dog")):
        tiny.write_images(tmp_path / name / "10_x", count)
        parts.append(f"[[datasets.subsets]]\nimage_dir = '{tmp_path / name / '10_x'}'\nclass_tokens = '{tokens}'\n")
    file = tmp_path / "data.toml"
    file.write_text(f"[[datasets]]\n{parts[0]}{parts[1]}[[datasets]]\nresolution = 128\n{parts[1]}", encoding="utf-8")
    world = make_world(tmp_path / "world")
    found = read(plan_of(world, tmp_path / "out", dataset_config=file, train_data_dir=None))
    assert {name: facts["img_count"] for name, facts in found["ss_dataset_dirs"].items()} == {
        "10_x": 1, "10_x (2)": 2, "10_x (3)": 2,
    }  # fmt: skip
    assert found["ss_tag_frequency"] == {"10_x": {"cat": 1}, "10_x (2)": {"dog": 2}}
    assert [each["tag_frequency"] for each in found["ss_datasets"]] == [
        {"10_x": {"cat": 1}, "10_x (2)": {"dog": 2}}, {"10_x (2)": {"dog": 2}},
    ]  # fmt: skip
    assert [subset["image_dir"] for each in found["ss_datasets"] for subset in each["subsets"]] == ["10_x"] * 3
