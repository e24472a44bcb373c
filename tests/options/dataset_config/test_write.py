"""Writing dataset files: a round trip gives the same records, and what is lost is reported."""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from library.options.dataset_config.convert import BUILT_IN, convert
from library.options.dataset_config.kohya import read_kohya
from library.options.dataset_config.simpletuner import read_backend
from library.options.dataset_config.write import to_kohya, to_simpletuner
from library.options.datasets import (
    BucketSettings,
    CaptionSettings,
    DatasetSpec,
    ImageSettings,
    ParsedDatasets,
    SubsetSpec,
)
from library.options.mistakes import UserError

KOHYA = """
[general]
enable_bucket = true
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 2

[[datasets]]
resolution = [512, 768]
batch_size = 4
validation_split = 0.1
min_bucket_reso = 320
bucket_reso_steps = 32

  [[datasets.subsets]]
  image_dir = 'C:\\data\\sks dog'
  num_repeats = 10
  class_tokens = "sks dog"
  flip_aug = true
  face_crop_aug_range = [2.0, 4.0]
  token_warmup_step = 0.5

  [[datasets.subsets]]
  image_dir = "犬/🐕"
  is_reg = true
  caption_prefix = 'a "real" one'
  alpha_mask = true
  background = "#00ff7f"
  caption_extension = ".txt,.caption"

[[datasets]]
resolutions = [512, 1024]
enable_bucket = false

  [[datasets.subsets]]
  metadata_file = "meta.json"
  image_dir = "images"
  caption_tag_dropout_rate = 0.25

[[datasets]]
resolution = 512

  [[datasets.subsets]]
  image_dir = "masked"
  conditioning_data_dir = "masks"
  random_crop = true
  resize_interpolation = "area"
"""
IMAGES = {"type": "local", "instance_data_dir": "data/dogs", "caption_strategy": "textfile"}
BACKEND = [
    IMAGES | {"id": "plain", "resolution": 1024, "resolution_type": "pixel_area", "repeats": 9},
    IMAGES
    | {"id": "small", "resolution": 0.5, "resolution_type": "area", "minimum_image_size": 0.3, "crop": True}
    | {"crop_aspect": "preserve", "maximum_image_size": 1.5, "target_downsample_size": 0.77},
    IMAGES
    | {"id": "square", "resolution": 0.5, "resolution_type": "area", "minimum_image_size": 0.3, "crop": True}
    | {"crop_style": "corner", "instance_prompt": "sks", "prepend_instance_prompt": True},
    IMAGES
    | {"id": "edge", "resolution": 500, "resolution_type": "pixel", "minimum_image_size": 400, "crop": True}
    | {"crop_aspect": "preserve", "maximum_image_size": 900, "target_downsample_size": 700, "crop_style": "center"},
    IMAGES
    | {"id": "edges", "resolution": 512, "resolution_type": "pixel", "minimum_image_size": 400, "crop": True}
    | {"instance_data_dir": "data/edges", "crop_style": "center", "disable_multiline_split": True},
    IMAGES
    | {"id": "shrunk", "resolution": 512, "resolution_type": "pixel", "crop": True, "crop_style": "center"}
    | {"maximum_image_size": 900, "target_downsample_size": 700, "caption_strategy": "filename"},
    IMAGES
    | {"id": "reg", "instance_data_dir": "data/reg", "is_regularization_data": True, "resolution": 1024}
    | {"caption_strategy": "instanceprompt", "instance_prompt": ["a dog", "one dog"], "conditioning_data": "m"},
    {"id": "m", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "data/reg masks"},
    IMAGES
    | {"id": "shuffled", "instance_data_dir": "data/x", "resolution": 1024, "instance_prompt": "x"}
    | {"caption_shuffle": {"enable": True, "position_start": 1}, "only_instance_prompt": False},
    {"id": "text", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache"},
]


def nameless(datasets: Sequence[DatasetSpec]) -> list[DatasetSpec]:
    """Without the origins."""
    return [
        replace(dataset, origin="", subsets=tuple(replace(subset, origin="") for subset in dataset.subsets))
        for dataset in datasets
    ]


def kohya(folder: Path, text: str) -> ParsedDatasets:
    path = folder / "data.toml"
    path.write_text(text, encoding="utf-8")
    return read_kohya(path, BUILT_IN, masked_loss=True)


def backend(folder: Path, text: str) -> ParsedDatasets:
    path = folder / "multidatabackend.json"
    path.write_text(text, encoding="utf-8")
    return read_backend(path, BUILT_IN)


def test_kohya_and_back_is_what_it_was(tmp_path: Path) -> None:
    found = kohya(tmp_path, KOHYA)
    assert not found.mistakes and len(found.datasets) == 4
    written = to_kohya(found.datasets)
    assert written.lost == ()
    again = kohya(tmp_path, written.text)
    assert not again.mistakes and nameless(again.datasets) == nameless(found.datasets)
    assert to_kohya(again.datasets) == written


def test_simpletuner_and_back_is_what_it_was(tmp_path: Path) -> None:
    found = backend(tmp_path, json.dumps(BACKEND))
    assert not found.mistakes and len(found.datasets) == 6
    written = to_simpletuner(found.datasets)
    again = backend(tmp_path, written.text)
    assert not again.mistakes and nameless(again.datasets) == nameless(found.datasets)
    assert to_simpletuner(again.datasets) == written
    ids = [entry["id"] for entry in json.loads(written.text)]
    assert len(set(ids)) == len(ids)
    told = ("SimpleTuner compares regularisation images", "SimpleTuner needs masks", "shuffle_caption")
    assert len(written.lost) == 3 and all(any(word in line for word in told) for line in written.lost), written.lost


@pytest.mark.parametrize("url", ["s3://bucket/sks dog", "simplecache::s3://bucket/dogs/", "memory://犬"])
def test_urls_stay_as_they_are(url: str, tmp_path: Path) -> None:
    plain = SubsetSpec(url, "", caption_extensions=(".txt",), mask_dir=f"{url}/masks")
    datasets = [DatasetSpec("", BucketSettings((512, 512)), (plain,))]
    for written, again in ((to_kohya(datasets), kohya), (to_simpletuner(datasets), backend)):
        found = again(tmp_path, written.text)
        ((subset,),) = (dataset.subsets for dataset in found.datasets)
        assert not found.mistakes and (subset.image_dir, subset.mask_dir) == (url, f"{url}/masks")
        assert any(f"{url} is a URL" in line for line in written.lost)


def test_shards_stay_as_they_are(tmp_path: Path) -> None:
    shards = SubsetSpec(
        None, "", caption_extensions=(".txt",), shards="s3://b/{0..9}.tar", shard_table=Path("t.sqlite")
    )
    datasets = [DatasetSpec("", BucketSettings((512, 512)), (shards,))]
    assert any("images in shards: unpack them" in line for line in to_simpletuner(datasets).lost)
    written = to_kohya(datasets)
    ((subset,),) = (dataset.subsets for dataset in kohya(tmp_path, written.text).datasets)
    assert (subset.image_dir, subset.shards, subset.shard_table) == (None, shards.shards, shards.shard_table)
    assert written.lost == ()


def some_subset(rng: random.Random, number: int) -> SubsetSpec:
    """A subset that both formats can express completely."""
    shuffle, validation = rng.random() < 0.5, number > 0 and rng.random() < 0.3
    return SubsetSpec(
        Path(f"data/{rng.choice(['sks dog', 'собака', 'a_b'])}{number}"),
        "",
        repeats=1 if validation else rng.randint(1, 20),
        is_reg=number > 0 and rng.random() < 0.5,
        validation=validation,
        caption_extensions=(".txt",),
        mask_dir=Path(f"masks/{number}") if rng.random() < 0.5 else None,
        captions=CaptionSettings(
            shuffle=shuffle,
            keep_tokens=rng.randint(0, 3) if shuffle else 0,
            separator=rng.choice([",", "."]) if shuffle else ",",
            prefix=rng.choice(["", "a photo of", 'with "quotes" \\']),
            wildcard=rng.random() < 0.5,
        ),
        images=ImageSettings(random_crop=not validation and rng.random() < 0.5),
    )


@pytest.mark.parametrize("seed", range(20))
def test_settings_of_both_formats_survive_either(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    sides = rng.sample(range(256, 1025, 64), rng.randint(1, 3))
    datasets = [
        DatasetSpec("", BucketSettings((side, side)), tuple(some_subset(rng, i) for i in range(rng.randint(1, 3))))
        for side in sides
    ]
    there = backend(tmp_path, to_simpletuner(datasets).text)
    assert not there.mistakes
    back = kohya(tmp_path, to_kohya(there.datasets).text)
    assert not back.mistakes and nameless(back.datasets) == datasets


def changed(subset: SubsetSpec) -> list[tuple[DatasetSpec, str]]:
    """A change that one of the formats cannot express, and a part of what must be reported."""
    plain = DatasetSpec("", BucketSettings((512, 512)), (subset,))

    def of(**keys: object) -> DatasetSpec:
        return replace(plain, subsets=(replace(subset, **keys),))

    captions, images = subset.captions, subset.images
    return [
        (replace(plain, batch_size=4), "--train_batch_size"),
        (replace(plain, validation_split=0.5), "validation_split = 0.5"),
        (replace(plain, validation_seed=5), "validation_seed = 5"),
        (replace(plain, buckets=BucketSettings((512, 512), True)), "kohya's buckets (256 to 1024 pixels)"),
        (replace(plain, buckets=BucketSettings((512, 512), True, True)), "no_upscale"),
        (replace(plain, buckets=BucketSettings((512, 768))), "resolution 512,768"),
        (replace(plain, buckets=BucketSettings((512, 512), True, step=32)), "--aspect_bucket_alignment"),
        (of(class_tokens="sks dog"), 'class_tokens = "sks dog"'),
        (of(caption_extensions=(".caption",)), "caption_extension = .caption"),
        (of(metadata_file=Path("meta.json"), caption_source="metadata"), "metadata_file"),
        (of(metadata_file=Path("meta.json"), caption_source="metadata", image_dir=None), "put them into a folder"),
        (of(alpha_mask=True), "alpha_mask = true"),
        (of(caption_encoding="shift_jis"), 'caption_encoding = "shift_jis"'),
        (of(is_reg=True), "is_reg"),
        (of(least_edge=300, least_area=90_001), "minimum edge"),
        (of(captions=replace(captions, dropout_rate=0.1)), "caption_dropout_rate = 0.1"),
        (of(captions=replace(captions, keep_tokens=1)), "keep_tokens = 1"),
        (of(captions=replace(captions, shuffle=True)), "SimpleTuner makes 10 fixed variants"),
        (of(mask_dir=Path("masks")), "masks with the file names of their images"),
        (of(captions=replace(captions, shuffle=True, separator="|")), "shuffle_caption = true"),
        (of(captions=replace(captions, wildcard=True), caption_source="file_name"), "enable_wildcard = true"),
        (of(captions=replace(captions, suffix="x")), 'caption_suffix = "x"'),
        (of(captions=replace(captions, prefix="x"), caption_source="class_tokens"), 'caption_prefix = "x"'),
        (of(captions=replace(captions, warmup_step=0.5)), "token_warmup_step = 0.5"),
        (of(images=replace(images, flip=True)), "flip_aug = true"),
        (of(images=replace(images, colour=True)), "color_aug = true"),
        (of(images=replace(images, face_crop=(1.0, 2.0))), "face_crop_aug_range = [1.0, 2.0]"),
        (of(images=replace(images, interpolation="area")), 'resize_interpolation = "area"'),
        (of(images=replace(images, background=(0, 0, 0))), 'background = "#000000"'),
        (of(recursive=False), "SimpleTuner reads sub-folders too"),
    ]


SUBSET = SubsetSpec(Path("data/dogs"), "", caption_extensions=(".txt",), recursive=True)
CHANGED = changed(SUBSET)


@pytest.mark.parametrize(("dataset", "said"), CHANGED, ids=[said for _, said in CHANGED])
def test_settings_that_simpletuner_lacks_are_reported(dataset: DatasetSpec, said: str) -> None:
    assert to_simpletuner([DatasetSpec("", BucketSettings((512, 512)), (SUBSET,))]).lost == ()
    lost = to_simpletuner([dataset]).lost
    assert any(said in line for line in lost), lost
    assert all(line.startswith(("dogs: ", "meta.json: ")) for line in lost)


@pytest.mark.parametrize(
    ("buckets", "keys", "said"),
    [
        (BucketSettings((512, 512), True, rule="area"), {}, "at the area of 512"),
        (BucketSettings((512, 512), True, rule="shorter_edge"), {}, "at a shorter edge of 512"),
        (BucketSettings((512, 512), rule="area", shrink_to=1e6), {}, "target_downsample_size"),
        (BucketSettings((512, 512)), {"recursive": True}, "sub-folders"),
        (BucketSettings((512, 512)), {"least_edge": 5}, "minimum_image_size"),
        (BucketSettings((512, 512)), {"least_area": 5}, "minimum_image_size"),
        (BucketSettings((512, 512)), {"caption_source": "file_name"}, "captions from file names"),
        (
            BucketSettings((512, 512)),
            {"caption_source": "class_tokens", "class_tokens": "x"},
            "one caption for all images",
        ),
        (BucketSettings((512, 512)), {"images": ImageSettings(corner_crop=True)}, "at the centre"),
        (BucketSettings((512, 512)), {"metadata_file": Path("m.json"), "class_tokens": "x"}, 'class_tokens = "x"'),
        (BucketSettings((512, 512)), {"is_reg": True}, "without training images"),
    ],
)
def test_settings_that_kohya_lacks_are_reported(buckets: BucketSettings, keys: dict[str, object], said: str) -> None:
    subset = replace(SUBSET, recursive=False)
    assert to_kohya([DatasetSpec("", BucketSettings((512, 512)), (subset,))]).lost == ()
    lost = to_kohya([DatasetSpec("", buckets, (replace(subset, **keys),))]).lost
    assert any(said in line for line in lost), lost


def test_a_setting_of_many_subsets_is_reported_once() -> None:
    subsets = tuple(replace(SUBSET, image_dir=Path(name), alpha_mask=True) for name in "abc")
    assert to_simpletuner([DatasetSpec("", BucketSettings((512, 512)), subsets)]).lost == (
        "a, b, c: alpha_mask = true",
    )


def test_metadata_and_folders_do_not_share_a_dataset_of_kohya() -> None:
    subsets = (SUBSET, replace(SUBSET, metadata_file=Path("m.json"), caption_source="metadata"))
    tables = tomllib.loads(to_kohya([DatasetSpec("", BucketSettings((512, 512)), subsets)]).text)["datasets"]
    assert [[sorted(subset) for subset in table["subsets"]] for table in tables] == [
        [["caption_extension", "image_dir"]],
        [["image_dir", "metadata_file"]],
    ]


def test_the_format_of_a_file_is_detected_by_its_contents(tmp_path: Path) -> None:
    toml, listed, table = tmp_path / "a.toml", tmp_path / "b.json", tmp_path / "c.json"
    toml.write_text(KOHYA, encoding="utf-8")
    listed.write_text(json.dumps(BACKEND), encoding="utf-8")
    table.write_text(json.dumps(tomllib.loads(KOHYA)), encoding="utf-8")
    assert [convert(path).dialect for path in (toml, listed, table)] == ["simpletuner", "kohya", "simpletuner"]
    assert convert(toml) == convert(table)
    assert convert(listed, "simpletuner").dialect == "simpletuner" and convert(listed).notes
    listed.write_text(json.dumps([{"id": "x", "resolution": "y"}]), encoding="utf-8")
    with pytest.raises(UserError) as error:
        convert(listed)
    assert len(error.value.mistakes) > 1
