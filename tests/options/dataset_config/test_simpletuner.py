"""SimpleTuner's data backend file, by the rules of its guide: each key, mistakes and notes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.data.buckets import build_bucket_table
from library.data.scan.scan import scan
from library.options.dataset_config.simpletuner import read_backend
from library.options.datasets import (
    BucketSettings,
    CaptionSettings,
    DatasetSpec,
    ImageSettings,
    ParsedDatasets,
    SubsetSpec,
)

DEFAULTS = DatasetSpec(
    "the command line",
    BucketSettings((512, 512)),
    (SubsetSpec(None, "the command line", captions=CaptionSettings(suffix="style"), images=ImageSettings(flip=True)),),
    batch_size=3,
)
IMAGES = {
    "id": "dogs",
    "type": "local",
    "instance_data_dir": "data/dogs",
    "caption_strategy": "instanceprompt",
    "instance_prompt": "a photo of sks dog",
    "resolution": 1024,
    "resolution_type": "pixel_area",
}
MASKS = {"id": "masks", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "data/masks"}


def read(tmp_path: Path, *entries: object, defaults: DatasetSpec = DEFAULTS) -> ParsedDatasets:
    path = tmp_path / "multidatabackend.json"
    path.write_text(json.dumps(list(entries), indent=2), encoding="utf-8")
    return read_backend(path, defaults)


def read_one(tmp_path: Path, **keys: object) -> tuple[DatasetSpec, SubsetSpec, str]:
    """The only dataset and subset of one valid entry, and all notes."""
    found = read(tmp_path, {name: value for name, value in (IMAGES | keys).items() if value is not ...})
    assert not found.mistakes
    [dataset] = found.datasets
    [subset] = dataset.subsets
    return dataset, subset, "\n".join(found.notes)


def mistakes(tmp_path: Path, **keys: object) -> str:
    found = read(tmp_path, {name: value for name, value in (IMAGES | keys).items() if value is not ...})
    return "\n".join(map(str, found.mistakes))


def test_a_plain_entry(tmp_path: Path) -> None:
    dataset, subset, notes = read_one(tmp_path)
    assert dataset.buckets == BucketSettings((1024, 1024), True, rule="area")
    assert dataset.batch_size == 3, "what the file cannot say comes from the command line"
    assert subset.image_dir == Path("data/dogs") and subset.recursive
    assert subset.caption_source == "class_tokens" and subset.class_tokens == "a photo of sks dog"
    assert subset.repeats == 1 and not subset.is_reg and subset.mask_dir is None
    assert subset.images == ImageSettings(flip=True) and subset.captions.suffix == "style"
    assert subset.origin == 'multidatabackend.json, line 2, "dogs"' == dataset.origin
    assert "a tenth of the captions" in notes


def test_eval_entries_are_only_validated_on(tmp_path: Path) -> None:
    unseen = IMAGES | {"id": "unseen", "dataset_type": "eval", "instance_data_dir": "data/unseen", "crop": True}
    of_class = IMAGES | {"id": "cls", "dataset_type": "eval", "instance_data_dir": "c", "is_regularisation_data": True}
    found = read(tmp_path, IMAGES | {"crop": True, "crop_style": "center"}, unseen | {"repeats": 9}, of_class)
    assert not found.mistakes and not any("crop" in note or "base_prediction" in note for note in found.notes)
    known = {s.image_dir: s for dataset in found.datasets for s in dataset.subsets}
    assert len(found.datasets) == 2, "those of one size share a dataset"
    assert [(known[Path(f)].validation, known[Path(f)].is_reg) for f in ("data/dogs", "data/unseen", "c")] == [
        (False, False), (True, False), (True, True),
    ]  # fmt: skip
    assert known[Path("data/unseen")].repeats == 1 and not known[Path("data/unseen")].images.random_crop


@pytest.mark.parametrize(("repeats", "times"), [(..., 1), (0, 1), (9, 10), (None, 1), (99.0, 100)])
def test_repeats_are_extra_passes(tmp_path: Path, repeats: object, times: int) -> None:
    assert read_one(tmp_path, repeats=repeats)[1].repeats == times


@pytest.mark.parametrize(
    ("kind", "resolution", "crop", "expected"),
    [
        ("pixel_area", 1024, False, ((1024, 1024), "area")),
        ("pixel_area", 1000, False, ((1024, 1024), "area")),
        (..., 512, False, ((512, 512), "area")),
        ("area", 1.0, False, ((1024, 1024), "area")),  # sqrt is 1000, and sides are multiples of 64
        ("area", 0.5, False, ((704, 704), "area")),
        ("area", 0.5, True, (768, 768)),  # with a square crop the known megapixels mean known sides
        ("area", 0.23, True, (512, 512)),
        ("area", 1.2, True, (1088, 1088)),
        ("pixel_area", 704, True, (704, 704)),
        ("pixel", 512, False, ((512, 512), "shorter_edge")),
        ("pixel", 500, False, ((500, 500), "shorter_edge")),
        ("pixel", 500, True, (512, 512)),
        (..., ..., False, ((512, 512), "area")),
    ],
)
def test_resolutions(tmp_path: Path, kind: object, resolution: object, crop: bool, expected: Any) -> None:
    dataset, _, _ = read_one(tmp_path, resolution=resolution, resolution_type=kind, crop=crop, crop_style="center")
    if crop:
        assert dataset.buckets == BucketSettings(expected)
    else:
        assert dataset.buckets == BucketSettings(expected[0], True, rule=expected[1])


@pytest.mark.parametrize(
    ("kind", "value", "crop", "expected"),
    [
        ("pixel", 768, False, (768, 0)),
        ("pixel_area", 768, False, (0, 768 * 768)),
        ("area", 0.75, False, (0, 750_000)),
        ("area", 0.75, True, (867, 750_000)),  # both edges too, at least its root
        ("pixel_area", 768, True, (768, 768 * 768)),
        ("pixel", 0, False, (0, 0)),
    ],
)
def test_small_images_are_skipped(
    tmp_path: Path, kind: str, value: float, crop: bool, expected: tuple[int, int]
) -> None:
    resolution = 1.0 if kind == "area" else 1024
    _, subset, _ = read_one(
        tmp_path, resolution=resolution, resolution_type=kind, minimum_image_size=value, crop=crop, crop_style="center"
    )
    assert (subset.least_edge, subset.least_area) == expected


@pytest.mark.parametrize(
    ("kind", "resolution", "target", "rule", "expected"),
    [
        ("pixel_area", 1024, 1280, "area", 1280.0**2),
        ("area", 1.0, 1.5, "area", 1.5e6),
        ("pixel", 512, 768, "shorter_edge", 768.0),
    ],
)
@pytest.mark.parametrize("aspect", ["square", "preserve"])
def test_large_images_are_scaled_before_the_crop(
    tmp_path: Path, kind: str, resolution: float, target: float, rule: Any, expected: float, aspect: str
) -> None:
    sizes = {"resolution": resolution, "resolution_type": kind, "maximum_image_size": target}
    keys = {**sizes, "target_downsample_size": target, "crop_aspect": aspect, "crop_style": "center"}
    dataset, _, _ = read_one(tmp_path, crop=True, **keys)
    buckets = dataset.buckets
    assert (buckets.enabled, buckets.rule, buckets.shrink_to) == (aspect == "preserve", rule, expected)
    dataset, _, notes = read_one(tmp_path, crop=False, **keys)
    assert dataset.buckets.shrink_to is None and "no effect without crop" in notes


@pytest.mark.parametrize(
    ("style", "random", "corner"),
    [(..., True, False), ("random", True, False), ("center", False, False), ("centre", False, False),
     ("corner", False, True)],
)  # fmt: skip
@pytest.mark.parametrize("crop", [True, False])
def test_crop_styles(tmp_path: Path, style: object, random: bool, corner: bool, crop: bool) -> None:
    _, subset, notes = read_one(tmp_path, crop=crop, crop_style=style)
    assert (subset.images.random_crop, subset.images.corner_crop) == (crop and random, crop and corner)
    assert ("latents cannot be cached" in notes) == (crop and random)


def test_captions_of_files(tmp_path: Path) -> None:
    _, subset, notes = read_one(tmp_path, caption_strategy="textfile")
    assert subset.caption_source == "files" and subset.caption_extensions == (".txt",)
    assert subset.captions.wildcard and subset.class_tokens is None and subset.captions.prefix == ""
    assert "one line of each .txt file" in notes and "instance_prompt is not used" in notes
    _, subset, notes = read_one(tmp_path, caption_strategy="textfile", disable_multiline_split=True)
    assert not subset.captions.wildcard and "the first line" in notes
    _, subset, _ = read_one(tmp_path, caption_strategy="textfile", prepend_instance_prompt=True)
    assert subset.captions.prefix == "a photo of sks dog"
    _, subset, _ = read_one(tmp_path, caption_strategy="textfile", only_instance_prompt=True)
    assert subset.caption_source == "class_tokens" and subset.class_tokens == "a photo of sks dog"


def test_captions_of_file_names(tmp_path: Path) -> None:
    _, subset, notes = read_one(tmp_path, caption_strategy="filename", instance_prompt=...)
    assert subset.caption_source == "file_name" and subset.class_tokens is None and "not used" not in notes
    _, subset, notes = read_one(tmp_path, caption_strategy=...)
    assert subset.caption_source == "file_name" and "no caption_strategy" in notes


def test_several_prompts_are_drawn_from(tmp_path: Path) -> None:
    _, subset, _ = read_one(tmp_path, instance_prompt=["a dog", " my dog "])
    assert subset.class_tokens == "a dog\nmy dog" and subset.captions.wildcard


def test_shuffled_captions(tmp_path: Path) -> None:
    shuffle = {"enable": True, "count": 3, "split_on": "period", "position_start": 2, "include_original": True}
    _, subset, notes = read_one(tmp_path, caption_strategy="textfile", caption_shuffle=shuffle)
    assert (subset.captions.shuffle, subset.captions.keep_tokens, subset.captions.separator) == (True, 2, ".")
    assert "shuffled each time" in notes
    assert not read_one(tmp_path, caption_shuffle={"enable": False, "position_start": 2})[1].captions.shuffle
    told = mistakes(tmp_path, caption_shuffle={"enabel": True, "split_on": "tab", "position_start": -1, "enable": True})
    assert "did you mean enable?" in told and 'caption_shuffle.split_on = "tab"' in told and "position_start" in told


@pytest.mark.parametrize(
    ("keys", "is_reg"),
    [
        ({"is_regularisation_data": True}, True),
        ({"is_regularization_data": True}, True),
        ({"is_regularisation_data": False, "is_regularization_data": True}, False),
        ({"is_regularisation_data": True, "is_regularization_data": False}, True),
    ],
)
def test_regularisation_in_both_spellings(tmp_path: Path, keys: dict[str, bool], is_reg: bool) -> None:
    _, subset, notes = read_one(tmp_path, **keys)
    assert subset.is_reg is is_reg and ("--preservation base_prediction" in notes) is is_reg


def test_masks_are_paired(tmp_path: Path) -> None:
    found = read(tmp_path, MASKS, IMAGES | {"conditioning_data": "masks"})
    assert not found.mistakes and found.datasets[0].subsets[0].mask_dir == Path("data/masks")
    listed = read(tmp_path, IMAGES | {"conditioning_data": ["masks"]}, MASKS | {"conditioning_type": "segmentation"})
    assert not listed.mistakes and listed.datasets[0].subsets[0].mask_dir == Path("data/masks")
    assert any("grey counts partly" in note for note in listed.notes)
    other_way = read(tmp_path, IMAGES, MASKS | {"source_dataset_id": "dogs"})
    assert other_way.datasets[0].subsets[0].mask_dir == Path("data/masks")
    alone = read(tmp_path, IMAGES, MASKS)
    assert alone.datasets[0].subsets[0].mask_dir is None
    assert any("these masks are not used" in note for note in alone.notes)
    differing = read(tmp_path, IMAGES | {"conditioning_data": "masks"}, MASKS | {"crop": True, "resolution": 1024})
    assert any("crop ignored: masks are cropped like their images" in note for note in differing.notes)


@pytest.mark.parametrize("named", ["gone", ["masks", "more"], 7, ["masks", 7]])
def test_missing_masks(tmp_path: Path, named: object) -> None:
    found = read(tmp_path, IMAGES | {"conditioning_data": named}, MASKS)
    assert len(found.mistakes) == 1 and "conditioning_data" in found.mistakes[0].what


def test_entries_of_equal_sizes_are_one_dataset(tmp_path: Path) -> None:
    entries = [
        IMAGES,
        IMAGES | {"id": "dogs-512", "resolution": 512},
        IMAGES | {"id": "reg", "instance_data_dir": "data/reg", "is_regularisation_data": True},
        IMAGES | {"id": "reg-512", "instance_data_dir": "data/reg", "resolution": 512, "is_regularisation_data": True},
        IMAGES | {"id": "again", "instance_prompt": "a dog", "instance_data_dir": "data//dogs"},
    ]
    found = read(tmp_path, *entries)
    assert not found.mistakes
    told = [(each.buckets.resolution[0], [subset.origin for subset in each.subsets]) for each in found.datasets]
    names = [(edge, [origin.split('"')[1] for origin in origins]) for edge, origins in told]
    assert names == [(1024, ["dogs", "reg"]), (512, ["dogs-512", "reg-512"]), (1024, ["again"])]


def test_caches_and_disabled_entries_are_noted(tmp_path: Path) -> None:
    text = {"id": "text", "dataset_type": "text_embeds", "default": True, "type": "aws"}
    off = {"id": "off", "disabled": True, "dataset_type": "video"}
    also_off = IMAGES | {"id": "off too", "disable": True, "resolution": "wrong"}
    keys = {
        "cache_dir_vae": "cache",
        "text_embeds": "text",
        "vae_cache_disable": True,
        "max_num_samples": None,
    }
    found = read(tmp_path, IMAGES | keys, text, off, also_off)
    assert not found.mistakes and len(found.datasets) == 1
    notes = "\n".join(found.notes)
    assert "(dogs): cache_dir_vae is not used: caches are found by content" in notes
    assert "(text): text_embeds is not needed" in notes and "(off, off too): disabled, skipped" in notes
    assert "text_embeds, vae_cache_disable: not needed, ignored" in notes


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"reapets": 3}, ["reapets = 3", "did you mean repeats?", "line 10"]),
        ({"nothing_like_it_at_all": 1}, ["not a key of this file"]),
        ({"type": "aws"}, ['type = "aws"', "use local"]),
        ({"metadata_backend": "parquet"}, ["metadata_backend", "use discovery"]),
        ({"dataset_type": "video"}, ['dataset_type = "video"', "remove the entry"]),
        (
            {"dataset_type": "conditioning", "conditioning_type": "controlnet"},
            ["conditioning_type", "only masks are supported"],
        ),
        ({"caption_strategy": "parquet"}, ["caption_strategy", "textfile"]),
        ({"instance_data_dir": ...}, ["instance_data_dir", "is missing"]),
        ({"instance_data_dir": 5}, ["instance_data_dir = 5", "not a path"]),
        ({"instance_prompt": ""}, ["instance_prompt", "is missing"]),
        ({"instance_prompt": [1]}, ["instance_prompt", "list of texts"]),
        ({"caption_strategy": "textfile", "prepend_instance_prompt": True, "instance_prompt": ...}, ["prepend"]),
        ({"resolution": "1024"}, ["not a number", "without quotes"]),
        ({"resolution": -1}, ["below 0"]),
        ({"resolution": 1.0}, ["is in pixels", '"resolution_type": "area"']),
        ({"resolution": 1024, "resolution_type": "area"}, ["is in megapixels", "pixel_area"]),
        ({"resolution_type": "pixels"}, ["did you mean pixel?"]),
        ({"maximum_image_size": 2048}, ["without target_downsample_size"]),
        ({"target_downsample_size": 2048}, ["without maximum_image_size"]),
        ({"minimum_image_size": 3000}, ["5 megapixels"]),
        ({"crop": "true"}, ["neither true nor false"]),
        ({"crop": True, "crop_aspect": "closest", "crop_aspect_buckets": [1.0, 0.5]}, ["crop_aspect", '"preserve"']),
        ({"crop": True, "crop_style": "face"}, ["crop_style", "face detection", '"center"']),
        ({"crop": True, "crop_style": "middle"}, ["not one of its values"]),
        ({"probability": 0.5}, ["probability = 0.5", "repeats"]),
        ({"repeats": -1}, ["repeats = -1"]),
        ({"repeats": 0.5}, ["repeats = 0.5"]),
        ({"start_step": 100}, ["start_step = 100", "--resume"]),
        ({"max_num_samples": 100}, ["max_num_samples"]),
        ({"slider_strength": -0.5}, ["slider_strength"]),
        ({"delete_unwanted_images": True}, ["delete_unwanted_images", "nothing is ever deleted"]),
        ({"minimum_aspect_ratio": 0.5}, ["minimum_aspect_ratio"]),
        ({"id": ""}, ["no id"]),
    ],
)
def test_mistakes(tmp_path: Path, keys: dict[str, object], said: list[str]) -> None:
    told = mistakes(tmp_path, **keys)
    assert all(word in told for word in said), told
    assert "multidatabackend.json" in told and "\n    -> " in told


def test_values_that_ask_for_nothing_are_no_mistake(tmp_path: Path) -> None:
    idle = {"probability": 1.0, "start_epoch": 1, "start_step": 0, "end_step": None, "crop_aspect": "square",
            "max_upscale_threshold": None, "slider_strength": "", "video": {}, "maximum_image_size": None}  # fmt: skip
    assert not mistakes(tmp_path, **idle)


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        IMAGES | {"reapets": 1, "crop": 1, "probability": 2},
        IMAGES | {"resolution": True},
        {"id": "sound", "dataset_type": "audio"},
    )
    assert len(found.mistakes) == 6  # the second entry has the id of the first
    assert len(found.datasets) == 2, "what is left can be looked at before the mistakes are told"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not valid JSON"),
        ("[{]", "line 1"),
        ("{}", "not a list of entries"),
        ("[1]", "not a list of entries"),
        ('{"datasets": []}', "--dataset_config"),
        ("[]", "no entry describes images"),
        ('[{"id": "a", "dataset_type": "eval", "instance_data_dir": "a"}]', "no entry describes images to train on"),
        ('[{"id": "a", "id": "b", "disabled": true}]', "id is set twice"),
        ("[" * 100_000, "too deep"),
    ],
)
def test_files_that_are_not_data_backend_files(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "данные.json"
    path.write_text(text, encoding="utf-8")
    found = read_backend(path, DEFAULTS)
    assert found.mistakes and any(said in str(mistake) for mistake in found.mistakes) and not found.datasets
    assert all("данные.json" in mistake.what for mistake in found.mistakes)


def test_no_file_and_no_resolution(tmp_path: Path) -> None:
    assert "no such file" in read_backend(tmp_path / "gone.json", DEFAULTS).mistakes[0].what
    nowhere = DatasetSpec("the command line", BucketSettings((0, 0)), ())
    found = read(tmp_path, {key: value for key, value in IMAGES.items() if "resolution" not in key}, defaults=nowhere)
    assert len(found.mistakes) == 1 and "resolution" in found.mistakes[0].what


def test_a_byte_order_mark_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    path.write_text(json.dumps([IMAGES]), encoding="utf-8-sig")
    assert not read_backend(path, DEFAULTS).mistakes


def test_the_described_images_are_found_on_disk(tmp_path: Path) -> None:
    for name, size in (("big_dog.png", (96, 64)), ("further/deep.png", (64, 64)), ("tiny.png", (64, 16))):
        for folder in ("dogs", "masks"):
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size).save(path)
    (tmp_path / "dogs" / "big_dog.txt").write_text("first\nsecond\n", encoding="utf-8")
    (tmp_path / "dogs" / "further" / "deep.txt").write_text("deep", encoding="utf-8")
    own = {"instance_data_dir": str(tmp_path / "dogs"), "resolution": 64, "minimum_image_size": 40}
    common = IMAGES | own | {"resolution_type": "pixel", "repeats": 1}
    names = {"id": "names", "caption_strategy": "filename", "crop": True, "crop_style": "center"}
    found = read(
        tmp_path,
        common | {"caption_strategy": "textfile", "conditioning_data": "masks"},
        common | names,
        MASKS | {"instance_data_dir": str(tmp_path / "masks")},
    )
    seen = scan(found.datasets)
    assert not found.mistakes and not seen.mistakes
    told = [(each.dataset, each.name, each.caption, each.repeats, each.mask) for each in seen.records]
    assert sorted(told) == [
        (0, "big_dog.png", "first\nsecond", 2, "big_dog.png"),
        (0, "further/deep.png", "deep", 2, "further/deep.png"),
        (1, "big_dog.png", "big dog", 2, None),
        (1, "further/deep.png", "deep", 2, None),
    ]
    table = build_bucket_table(seen.records, seen.datasets)
    assert table.samples == {(0, (64, 64)): 2, (0, (128, 64)): 2, (1, (64, 64)): 4}
