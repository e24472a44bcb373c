"""kohya's dataset file: each key at each level, fall-backs, and the same records from TOML and JSON."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from library.options.dataset_config.keys import KEYS
from library.options.dataset_config.kohya import read_kohya
from library.options.dataset_config.sizes import NOT_GIVEN
from library.options.datasets import BucketSettings, DatasetSpec, ParsedDatasets, SubsetSpec

DEFAULTS = DatasetSpec("command line", BucketSettings((512, 512)), (SubsetSpec(None, "command line"),))

# Key -> the levels where kohya takes it (g general, d dataset, s subset), as its documentation has them.
LEVELS = {
    "batch_size": "gd", "resolution": "gd", "enable_bucket": "gd", "bucket_no_upscale": "gd", "min_bucket_reso": "gd",
    "max_bucket_reso": "gd", "bucket_reso_steps": "gd", "network_multiplier": "gd", "validation_split": "gd",
    "validation_seed": "gd", "resize_interpolation": "gds", "num_repeats": "gds", "color_aug": "gds", "flip_aug": "gds",
    "random_crop": "gds", "shuffle_caption": "gds", "enable_wildcard": "gds", "face_crop_aug_range": "gds",
    "keep_tokens": "gds", "keep_tokens_separator": "gds", "secondary_separator": "gds", "caption_prefix": "gds",
    "caption_suffix": "gds", "caption_separator": "gds", "token_warmup_min": "gds", "token_warmup_step": "gds",
    "custom_attributes": "gds", "caption_dropout_rate": "gds", "caption_tag_dropout_rate": "gds",
    "caption_dropout_every_n_epochs": "gds", "caption_extension": "gds", "cache_info": "gds", "class_tokens": "gds",
    "image_dir": "s", "is_reg": "s", "alpha_mask": "s", "metadata_file": "s", "conditioning_data_dir": "s",
}  # fmt: skip
OURS = {
    "resolutions": "gd", "pixels_per_batch": "gd", "caption_encoding": "gds", "background": "gds",
    "aesthetic_score": "gds", "validation": "s", "shards": "s", "shard_table": "s",
}  # fmt: skip

# Key, a value as in the file, where the record has it, the record's value.
CASES: list[tuple[str, Any, str, Any]] = [
    ("batch_size", 3, "batch_size", 3),
    ("resolution", 768, "buckets.resolution", (768, 768)),
    ("resolution", [512, 768], "buckets.resolution", (512, 768)),
    ("enable_bucket", True, "buckets.enabled", True),
    ("bucket_no_upscale", True, "buckets.no_upscale", True),
    ("min_bucket_reso", 320, "buckets.smallest", 320),
    ("max_bucket_reso", 2048, "buckets.largest", 2048),
    ("bucket_reso_steps", 32, "buckets.step", 32),
    ("validation_split", 0.25, "validation_split", 0.25),
    ("validation_split", 1, "validation_split", 1.0),
    ("validation_seed", 7, "validation_seed", 7),
    ("resize_interpolation", "bicubic", "subset.images.interpolation", "bicubic"),
    ("num_repeats", 10, "subset.repeats", 10),
    ("color_aug", True, "subset.images.colour", True),
    ("flip_aug", True, "subset.images.flip", True),
    ("random_crop", True, "subset.images.random_crop", True),
    ("shuffle_caption", True, "subset.captions.shuffle", True),
    ("enable_wildcard", True, "subset.captions.wildcard", True),
    ("face_crop_aug_range", [1.5, 4], "subset.images.face_crop", (1.5, 4.0)),
    ("keep_tokens", 2, "subset.captions.keep_tokens", 2),
    ("keep_tokens_separator", "|||", "subset.captions.keep_tokens_separator", "|||"),
    ("secondary_separator", ";;;", "subset.captions.secondary_separator", ";;;"),
    ("caption_prefix", "a", "subset.captions.prefix", "a"),
    ("caption_suffix", "b", "subset.captions.suffix", "b"),
    ("caption_separator", ";", "subset.captions.separator", ";"),
    ("token_warmup_min", 2, "subset.captions.warmup_min", 2),
    ("token_warmup_step", 0.5, "subset.captions.warmup_step", 0.5),
    ("token_warmup_step", 100, "subset.captions.warmup_step", 100.0),
    ("caption_dropout_rate", 0.1, "subset.captions.dropout_rate", 0.1),
    ("caption_tag_dropout_rate", 1, "subset.captions.tag_dropout_rate", 1.0),
    ("caption_dropout_every_n_epochs", 4, "subset.captions.dropout_every_n_epochs", 4),
    ("caption_extension", "", "subset.caption_extensions", (".none",)),
    ("caption_extension", "txt", "subset.caption_extensions", (".txt",)),
    ("caption_extension", ".txt, caption", "subset.caption_extensions", (".txt", ".caption")),
    ("class_tokens", "sks dog", "subset.class_tokens", "sks dog"),
    ("class_tokens", "", "subset.class_tokens", ""),
    ("image_dir", "images/犬", "subset.image_dir", Path("images/犬")),
    ("alpha_mask", True, "subset.alpha_mask", True),
    ("validation", True, "subset.validation", True),
    ("conditioning_data_dir", "masks", "subset.mask_dir", Path("masks")),
    ("caption_encoding", "shift_jis", "subset.caption_encoding", "shift_jis"),
    ("background", "#FF8000", "subset.images.background", (255, 128, 0)),
    ("aesthetic_score", 6, "subset.score", 6.0),
    ("aesthetic_score", 0.0, "subset.score", 0.0),
]
WITHOUT_RECORD = [("network_multiplier", 1), ("custom_attributes", {}), ("cache_info", False)]
LEVEL_NAMES = {"g": "general", "d": "dataset", "s": "subset"}


def tree_with(key: str, value: object, level: str, **subset: object) -> dict[str, Any]:
    """A dataset file of one subset with one more key at one level."""
    tree: dict[str, Any] = {"general": {}, "datasets": [{"subsets": [{"image_dir": "images", **subset}]}]}
    tables = {"g": tree["general"], "d": tree["datasets"][0], "s": tree["datasets"][0]["subsets"][0]}
    tables[level][key] = value
    return tree


def read(folder: Path, tree: object, defaults: DatasetSpec = DEFAULTS, masked_loss: bool = True) -> ParsedDatasets:
    path = folder / "data.toml"
    text = tree if isinstance(tree, str) else tomli_w.dumps(tree)  # type: ignore[arg-type]
    path.write_text(text, encoding="utf-8")
    return read_kohya(path, defaults, masked_loss=masked_loss)


def one(found: ParsedDatasets) -> DatasetSpec:
    assert found.mistakes == ()
    (dataset,) = found.datasets
    return dataset


def value_at(dataset: DatasetSpec, target: str) -> object:
    value: Any = dataset
    for name in target.split("."):
        value = value.subsets[0] if name == "subset" else getattr(value, name)
    return value


def test_the_keys_and_their_levels_are_kohyas_and_ours() -> None:
    levels = {name: "".join(level[0] for level in key.levels) for name, key in KEYS.items()}
    assert levels == {**LEVELS, **OURS}
    tried = {case[0] for case in CASES} | {name for name, _ in WITHOUT_RECORD}
    assert tried | {"is_reg", "metadata_file", "resolutions", "pixels_per_batch", "shards", "shard_table"} == set(KEYS)


@pytest.mark.parametrize(("key", "value", "target", "expected"), CASES)
def test_each_key_at_each_level(tmp_path: Path, key: str, value: object, target: str, expected: object) -> None:
    for level, name in LEVEL_NAMES.items():
        found = read(tmp_path, tree_with(key, value, level))
        if level in {**LEVELS, **OURS}[key]:
            assert value_at(one(found), target) == expected
            assert type(value_at(one(found), target)) is type(expected)
        else:
            assert len(found.mistakes) == 1
            assert found.mistakes[0].what.startswith(f"{key} = ")
            assert f"is not a key of {'' if level == 'g' else 'a '}{name}" in found.mistakes[0].what
            assert found.mistakes[0].remedy.startswith("move it to ")


@pytest.mark.parametrize(("key", "value"), WITHOUT_RECORD)
def test_keys_that_mean_nothing_here_are_taken_where_they_ask_for_nothing(
    tmp_path: Path, key: str, value: object
) -> None:
    for level in LEVELS[key]:
        found = read(tmp_path, tree_with(key, value, level))
        assert one(found) and found.notes == ()


def test_missing_keys_use_the_command_line_and_then_the_defaults(tmp_path: Path) -> None:
    text = "[[datasets]]\n\n[[datasets.subsets]]\nimage_dir = 'a'\n"
    subset = SubsetSpec(Path("a"), "data.toml, line 3")
    assert read(tmp_path, text) == ParsedDatasets((replace(DEFAULTS, origin="data.toml, line 1", subsets=(subset,)),))
    template = SubsetSpec(None, "command line", repeats=4, class_tokens="cat", caption_extensions=(".txt",))
    said = DatasetSpec("command line", BucketSettings((768, 512), enabled=True, step=32), (template,), 5, 0.5, 3)
    dataset = one(read(tmp_path, text, said))
    assert dataset == replace(
        said,
        origin="data.toml, line 1",
        subsets=(replace(template, origin="data.toml, line 3", image_dir=Path("a")),),
    )


def test_a_value_falls_back_from_subset_to_dataset_to_general_to_the_command_line(tmp_path: Path) -> None:
    text = """
        [general]
        keep_tokens = 1
        shuffle_caption = true
        batch_size = 2
        [[datasets]]
        keep_tokens = 2
        batch_size = 4
        [[datasets.subsets]]
        image_dir = "a"
        keep_tokens = 0
        shuffle_caption = false
        [[datasets.subsets]]
        image_dir = "b"
        [[datasets]]
        [[datasets.subsets]]
        image_dir = "c"
    """
    template = replace(
        DEFAULTS.subsets[0], captions=replace(DEFAULTS.subsets[0].captions, keep_tokens=9, dropout_rate=0.5)
    )
    found = read(tmp_path, text, replace(DEFAULTS, subsets=(template,), batch_size=8))
    assert found.mistakes == ()
    first, second = found.datasets
    captions = [subset.captions for dataset in (first, second) for subset in dataset.subsets]
    assert [caption.keep_tokens for caption in captions] == [0, 2, 1]  # false and 0 are values, too
    assert [caption.shuffle for caption in captions] == [False, True, True]
    assert [caption.dropout_rate for caption in captions] == [0.5] * 3
    assert (first.batch_size, second.batch_size) == (4, 2)


def test_the_places_that_the_command_line_names_are_not_those_of_subsets(tmp_path: Path) -> None:
    template = SubsetSpec(Path("x"), "", metadata_file=Path("y"), mask_dir=Path("z"), is_reg=True)
    found = read(tmp_path, tree_with("num_repeats", 1, "s"), replace(DEFAULTS, subsets=(template,)))
    (subset,) = one(found).subsets
    assert (subset.image_dir, subset.metadata_file, subset.mask_dir, subset.is_reg) == (
        Path("images"), None, None, False
    )  # fmt: skip


def test_metadata_makes_a_fine_tuning_dataset(tmp_path: Path) -> None:
    text = """
        [general]
        class_tokens = "dog"
        caption_extension = ".txt"
        flip_aug = true
        [[datasets]]
        [[datasets.subsets]]
        metadata_file = "m.json"
        [[datasets.subsets]]
        metadata_file = "n.json"
        image_dir = "n"
        alpha_mask = true
        [[datasets]]
        [[datasets.subsets]]
        image_dir = "a"
    """
    found = read(tmp_path, text)
    assert found.mistakes == () and found.notes == ()
    first, second = found.datasets[0].subsets
    assert (first.image_dir, first.metadata_file, first.caption_source) == (None, Path("m.json"), "metadata")
    assert (second.image_dir, second.metadata_file, second.alpha_mask) == (Path("n"), Path("n.json"), True)
    assert first.class_tokens is None and first.images.flip
    (plain,) = found.datasets[1].subsets
    assert (plain.caption_source, plain.class_tokens, plain.caption_extensions) == ("files", "dog", (".txt",))


def test_general_keys_that_apply_to_no_dataset_are_noted(tmp_path: Path) -> None:
    found = read(tmp_path, '[general]\nclass_tokens = "dog"\n[[datasets]]\n[[datasets.subsets]]\nmetadata_file = "m"\n')
    assert one(found).subsets[0].class_tokens is None
    (note,) = found.notes
    assert note.startswith('class_tokens = "dog" (data.toml, line 2) has no effect')


def test_masks_for_some_subsets_and_with_other_keys(tmp_path: Path) -> None:
    text = """
        [[datasets]]
        [[datasets.subsets]]
        image_dir = "a"
        conditioning_data_dir = "a_masks"
        class_tokens = "dog"
        [[datasets.subsets]]
        image_dir = "b"
        alpha_mask = true
        [[datasets]]
        [[datasets.subsets]]
        metadata_file = "c.json"
        conditioning_data_dir = "c_masks"
    """
    found = read(tmp_path, text)
    assert found.mistakes == ()
    subsets = [subset for dataset in found.datasets for subset in dataset.subsets]
    assert [subset.mask_dir for subset in subsets] == [Path("a_masks"), None, Path("c_masks")]
    assert [subset.alpha_mask for subset in subsets] == [False, True, False]


def test_mask_folders_override_alpha_mask_of_the_command_line_with_a_note(tmp_path: Path) -> None:
    defaults = replace(DEFAULTS, subsets=(replace(DEFAULTS.subsets[0], alpha_mask=True),))
    found = read(tmp_path, tree_with("conditioning_data_dir", "masks", "s"), defaults)
    assert one(found).subsets[0].alpha_mask is False
    assert len(found.notes) == 1 and "alpha_mask (command line) has no effect" in found.notes[0]
    without = read(tmp_path, tree_with("num_repeats", 2, "s"), defaults)
    assert one(without).subsets[0].alpha_mask is True and without.notes == ()


def test_one_dataset_at_several_resolutions(tmp_path: Path) -> None:
    text = """
        [general]
        resolution = 640
        enable_bucket = true
        max_bucket_reso = 2048
        [[datasets]]
        resolutions = [512, [768, 512], 1024]
        batch_size = [8, 4, 2]
        [[datasets.subsets]]
        image_dir = "a"
    """
    found = read(tmp_path, text)
    assert found.mistakes == ()
    assert [(spec.buckets.resolution, spec.batch_size) for spec in found.datasets] == [
        ((512, 512), 8), ((768, 512), 4), ((1024, 1024), 2)
    ]  # fmt: skip
    assert len({spec.origin for spec in found.datasets}) == 1
    assert found.datasets[0].subsets == found.datasets[1].subsets == found.datasets[2].subsets
    same = read(tmp_path, text.replace("[8, 4, 2]", "3"))
    assert [spec.batch_size for spec in same.datasets] == [3, 3, 3]


def test_a_pixel_budget_for_each_batch(tmp_path: Path) -> None:
    text = """
        [general]
        resolutions = [512, 768, 1024, 2048]
        pixels_per_batch = 2_097_152
        [[datasets]]
        [[datasets.subsets]]
        image_dir = "a"
        [[datasets]]
        batch_size = 5
        resolution = 512
        [[datasets.subsets]]
        image_dir = "b"
    """
    found = read(tmp_path, text)
    assert found.mistakes == ()
    # 2 Mi pixels: 8 of 512 x 512, 3 of 768 x 768, 2 of 1024 x 1024; one of 2048 x 2048 has more
    assert [spec.batch_size for spec in found.datasets] == [8, 3, 2, 1, 5]
    assert found.notes == (
        "pixels_per_batch = 2097152 (data.toml, line 4) is less than one image of 2048 x 2048: the batch size is 1",
    )


def test_bucket_limits_are_widened_to_the_step_with_a_note(tmp_path: Path) -> None:
    tree = tree_with("min_bucket_reso", 300, "g")
    tree["general"] |= {"enable_bucket": True, "max_bucket_reso": 1000}
    found = read(tmp_path, tree)
    buckets = one(found).buckets
    assert (buckets.smallest, buckets.largest) == (256, 1024)
    assert len(found.notes) == 2
    assert all("bucket_reso_steps = 64 (command line)" in note for note in found.notes)


@pytest.mark.parametrize(
    ("general", "step", "resolution", "note"),
    [
        ("enable_bucket = true\nbucket_reso_steps = 1\nresolution = 512", 8, (512, 512),
         "bucket_reso_steps = 1 (data.toml, line 3) becomes 8, a multiple of 8"),
        ("bucket_reso_steps = 1\nresolution = 512", 1, (512, 512), ""),
        ("resolution = [512, 650]", 64, (512, 648),
         "resolution = [512, 650] (data.toml, line 2) becomes 512x648: sides are multiples of 8"),
        ("enable_bucket = true\nresolution = 600", 64, (600, 600),
         "resolution = 600 (data.toml, line 3): only its area counts; the sides of a bucket are multiples of 64"),
    ],
)  # fmt: skip
def test_sizes_that_training_cannot_have_become_the_nearest(
    tmp_path: Path, general: str, step: int, resolution: tuple[int, int], note: str
) -> None:
    found = read(tmp_path, f"[general]\n{general}\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n")
    buckets = one(found).buckets
    assert (buckets.step, buckets.resolution) == (step, resolution)
    assert found.notes == ((note,) if note else ())


def test_a_subset_with_no_repeats_is_skipped_with_a_note(tmp_path: Path) -> None:
    text = """
        [[datasets]]
        num_repeats = 0
        [[datasets.subsets]]
        image_dir = "a"
        [[datasets.subsets]]
        image_dir = "b"
        num_repeats = 2
    """
    found = read(tmp_path, text)
    assert [subset.image_dir for subset in one(found).subsets] == [Path("b")]
    assert found.notes == ("num_repeats = 0 (data.toml, line 3): the subset on line 4 is skipped",)


def test_a_folder_listed_twice_in_a_dataset_is_used_once_with_a_note(tmp_path: Path) -> None:
    text = """
        [[datasets]]
        [[datasets.subsets]]
        image_dir = "a/b"
        num_repeats = 3
        [[datasets.subsets]]
        image_dir = "a/./b/"
        [[datasets]]
        [[datasets.subsets]]
        image_dir = "a/b"
    """
    found = read(tmp_path, text)
    assert found.mistakes == ()
    assert [[subset.repeats for subset in spec.subsets] for spec in found.datasets] == [[3], [1]]
    (note,) = found.notes
    assert "(data.toml, line 7)" in note and "(data.toml, line 4)" in note and "the later one is skipped" in note


def test_keys_without_effect_are_noted_unless_neutral(tmp_path: Path) -> None:
    for line in ("network_multiplier = 0.5", "cache_info = true"):
        found = read(tmp_path, f"[[datasets]]\n{line}\n[[datasets.subsets]]\nimage_dir = 'a'\n")
        assert one(found)
        assert len(found.notes) == 1 and found.notes[0].startswith(f"{line} (data.toml, line 2) has no effect")


def test_regularisation_images_beside_those_they_regularise(tmp_path: Path) -> None:
    tree = tree_with("is_reg", True, "s")
    tree["datasets"][0]["subsets"].append({"image_dir": "other"})
    assert [subset.is_reg for subset in one(read(tmp_path, tree)).subsets] == [True, False]


def test_null_in_json_is_not_set_and_a_bom_is_accepted(tmp_path: Path) -> None:
    tree = tree_with("validation_seed", None, "d", class_tokens=None, conditioning_data_dir=None, metadata_file=None)
    tree["general"] = {"keep_tokens": 3}
    tree["datasets"][0]["subsets"][0]["keep_tokens"] = None
    path = tmp_path / "DATA.JSON"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(tree).encode())
    dataset = one(read_kohya(path, DEFAULTS))
    assert dataset.subsets[0].captions.keep_tokens == 3
    assert dataset.origin == "DATA.JSON, line 1"
    (tmp_path / "b.toml").write_bytes(b"\xef\xbb\xbf[[datasets]]\r\n[[datasets.subsets]]\r\nimage_dir = 'a'\r\n")
    assert one(read_kohya(tmp_path / "b.toml", DEFAULTS)).subsets[0].origin == "b.toml, line 2"


def test_a_resolution_may_come_from_the_command_line_alone(tmp_path: Path) -> None:
    tree = tree_with("num_repeats", 1, "s")
    assert one(read(tmp_path, tree)).buckets.resolution == (512, 512)
    nowhere = read(tmp_path, tree, replace(DEFAULTS, buckets=BucketSettings(NOT_GIVEN)))
    assert [mistake.what for mistake in nowhere.mistakes] == ["the dataset (data.toml, line 3) has no resolution"]


def random_file(rng: random.Random) -> dict[str, Any]:
    """A valid file with some keys of each level and a few datasets and subsets."""
    cases = [case[:2] for case in CASES if case[0] not in ("image_dir", "conditioning_data_dir", "alpha_mask")]

    def some(level: str) -> dict[str, Any]:
        fitting = [case for case in cases if level in {**LEVELS, **OURS}[case[0]]]
        return dict(rng.sample(fitting, rng.randint(0, len(fitting) // 2)))

    def subset(place: int) -> dict[str, Any]:
        masks = rng.choice([{}, {"alpha_mask": True}, {"conditioning_data_dir": "masks"}])
        return {"image_dir": f"images {place}", **masks, **some("s")}

    datasets = [
        {**some("d"), "subsets": [subset(place) for place in range(rng.randint(1, 3))]}
        for _ in range(rng.randint(1, 3))
    ]
    return {"general": some("g"), "datasets": datasets}


def without_origins(found: ParsedDatasets) -> list[DatasetSpec]:
    assert found.mistakes == ()
    return [
        replace(spec, origin="", subsets=tuple(replace(subset, origin="") for subset in spec.subsets))
        for spec in found.datasets
    ]


@pytest.mark.parametrize("seed", range(40))
def test_both_endings_give_the_same_records(tmp_path: Path, seed: int) -> None:
    tree = random_file(random.Random(seed))
    path = tmp_path / "data.json"
    path.write_text(json.dumps(tree, ensure_ascii=False, indent=seed % 3), encoding="utf-8")
    from_json = without_origins(read_kohya(path, DEFAULTS, masked_loss=True))
    assert from_json == without_origins(read(tmp_path, tree))
    assert len(from_json) == len(tree["datasets"])


def test_shards_stand_in_place_of_a_folder(tmp_path: Path) -> None:
    pattern = "s3://bucket/train-{000..099}.tar"
    tree: dict[str, Any] = {"datasets": [{"subsets": [{"shards": pattern, "shard_table": "t/shards.sqlite"}]}]}
    subset = one(read(tmp_path, tree)).subsets[0]
    assert (subset.image_dir, subset.shards, subset.shard_table) == (None, pattern, Path("t/shards.sqlite"))
    assert subset.caption_source == "files"
    tree["datasets"][0]["subsets"] = [{"shards": "a"}, {"shards": "a", "image_dir": "b"}, {"shards": "a/"}]
    found = read(tmp_path, tree)
    assert ["image_dir and shards are both set" in mistake.what for mistake in found.mistakes] == [True]
    assert "already a subset" in "".join(found.notes)
    tree["datasets"][0]["subsets"] = [{"image_dir": "b", "shard_table": "t"}]
    assert "shard_table is set without shards" in read(tmp_path, tree).mistakes[0].what
