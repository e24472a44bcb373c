"""Mistakes in a dataset file: all at once, each with its line and remedy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from library.options.dataset_config.keys import KEYS
from library.options.dataset_config.kohya import read_kohya
from library.options.datasets import BucketSettings, DatasetSpec, ParsedDatasets, SubsetSpec
from library.options.mistakes import Mistake

DEFAULTS = DatasetSpec("command line", BucketSettings((512, 512)), (SubsetSpec(None, "command line"),))
PLAIN = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n"


def read(folder: Path, text: str, masked_loss: bool = False, name: str = "data.toml") -> ParsedDatasets:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return read_kohya(path, DEFAULTS, masked_loss=masked_loss)


def only(found: ParsedDatasets) -> Mistake:
    assert len(found.mistakes) == 1, found.mistakes
    return found.mistakes[0]


def test_all_mistakes_of_a_file_are_reported_together_with_their_lines(tmp_path: Path) -> None:
    text = """[general]
shuffle_captions = true
batch_size = "4"
is_reg = true

[[datasets]]
resolution = "512,768"   # the command line takes this
train_batch_size = 2
prior_loss_weight = 0.5
flip_aug = 1

  [[datasets.subsets]]
  image_dir = 'a'
  num_repeat = 10
  validation_split = 0.1
  caption_dropout_rate = 1.5

  [[datasets.subsets]]
  class_tokens = "dog"
  metadata_file = 3

[dataset]
x = 1
"""
    found = read(tmp_path, text)
    expected = {
        "shuffle_captions = true (data.toml, line 2) is not a key of general": "did you mean shuffle_caption?",
        'batch_size = "4" (data.toml, line 3) is not a whole number': "write 4, without quotes",
        "is_reg = true (data.toml, line 4) is not a key of general": "move it to a subset",
        'resolution = "512,768" (data.toml, line 7) is not a resolution': "[512, 768], without quotes",
        "train_batch_size = 2 (data.toml, line 8) is not a key of a dataset": "write batch_size",
        "prior_loss_weight = 0.5 (data.toml, line 9) is not a key of a dataset": "command line",
        "flip_aug = 1 (data.toml, line 10) is neither true nor false": "without quotes",
        "num_repeat = 10 (data.toml, line 14) is not a key of a subset": "did you mean num_repeats?",
        "validation_split = 0.1 (data.toml, line 15) is not a key of a subset": "move it to general or to a dataset",
        "caption_dropout_rate = 1.5 (data.toml, line 16) is not a number from 0 to 1": "in this range",
        "(line 20) and subsets without": "put them in two datasets",
        "class_tokens = \"dog\" (data.toml, line 19) has no meaning in a dataset whose subsets have a metadata_file":
            "remove it",
        "metadata_file = 3 (data.toml, line 20) is not a path": "in quotes",
        "(data.toml, line 22) is not a top-level key": "the top-level keys are general and datasets",
    }  # fmt: skip
    for what, remedy in expected.items():
        (mistake,) = [mistake for mistake in found.mistakes if what in mistake.what]
        assert remedy in mistake.remedy
    assert len(found.mistakes) == len(expected)
    # what is right is there all the same, so that the images can be checked, too
    assert [subset.image_dir for spec in found.datasets for subset in spec.subsets] == [Path("a")]


def test_the_same_mistakes_have_their_lines_in_json(tmp_path: Path) -> None:
    text = """{
  "general": {"shuffle_captions": true},
  "datasets": [
    {
      "resolution": "512",
      "subsets": [
        {"image_dir": "a"}, {"image_dir": "b",
          "num_repeats": 2.5, "flip_aug": null,
          "num_repeats": "2"
        }
      ]
    }
  ]
}"""
    found = read(tmp_path, text, name="data.json")
    assert [mistake.what for mistake in found.mistakes] == [
        "num_repeats is set twice in one table (data.json, line 9)",
        "shuffle_captions = true (data.json, line 2) is not a key of general",
        'resolution = "512" (data.json, line 5) is not a resolution',
        'num_repeats = "2" (data.json, line 9) is not a whole number',
    ]
    assert [subset.origin for subset in found.datasets[0].subsets] == ["data.json, line 7", "data.json, line 7"]


# Keys, values as in TOML with ";" between them, and what is wrong with each of them.
IN_SUBSETS = [
    ("flip_aug shuffle_caption is_reg alpha_mask", "1; 'true'; 'a'; []", "neither true nor false"),
    ("keep_tokens num_repeats token_warmup_min", "true; '1'; 1.5; 1.0; [1]", "not a whole number"),
    ("keep_tokens num_repeats caption_dropout_every_n_epochs", "-1", "is below 0"),
    ("caption_dropout_rate token_warmup_step", "'0.1'; true; nan; inf; {}", "not a number"),
    ("caption_dropout_rate caption_tag_dropout_rate", "-0.1; 1.01; 2", "not a number from 0 to 1"),
    ("token_warmup_step", "-1", "not a number of at least 0"),
    ("aesthetic_score", "-0.5; 10.5; 11", "not a number from 0 to 10"),
    ("caption_prefix class_tokens caption_extension background caption_encoding", "1; []; true", "not a text"),
    ("caption_separator caption_encoding", "''", "is empty"),
    ("caption_extension", "'.'; '.txt,'; ' , '", "not a file extension"),
    ("background", "'white'; '#fff'; '#12345g'; '#1234567'; 'ffffff'", "not a colour"),
    ("caption_encoding", "'utf9'; 'base64'; 'rot13'", "not an encoding"),
    ("resize_interpolation", "'sinc'; 3; ''; []", "not one of its values"),
    ("face_crop_aug_range", "'2.0,4.0'; [1.0]; [1, 'a']; [1, 2, 3]; [-1, 2]", "not a pair of numbers"),
    ("face_crop_aug_range", "[4, 2]", "the larger number first"),
    ("custom_attributes", "1; 'a'; []", "not a table"),
    ("image_dir", "''; ' '; 5; ['a']", "not a path"),
    ("image_dir", r'"C:\train"; "C:\new"', "a tab or another control character"),
    ("image_dir", r'"a\u0000b"', "NUL"),
    ("metadata_file", "'s3://bucket/meta.json'", "is a URL"),
]
IN_DATASETS = [
    ("resolution", "'512'; [512]; [512, 512, 512]; 0; true; 512.0; [512, '512']", "not a resolution"),
    ("resolutions", "512; []; ['512']; [[512]]; {}", "not a list of resolutions"),
    ("resolutions", "[512, 768, 512]; [512, [512, 512]]", "the same resolution twice"),
    ("batch_size", "0; -1", "is below 1"),
    ("batch_size", "[]", "is an empty list"),
    ("batch_size", "[4, 2]", "has 2 entries for 1 resolutions"),
    ("batch_size", "[4, '2']", "has an entry that is not a whole number"),
    ("batch_size pixels_per_batch", "1.5; '4'", "not a whole number"),
    ("min_bucket_reso max_bucket_reso", "8", "is below 64"),
    ("validation_split", "2; -0.5", "not a number from 0 to 1"),
    ("validation_seed", "'a'; 1.5", "not a whole number"),
    ("network_multiplier", "'a'; true", "not a number"),
    ("resolution", "56", "is below 64 pixels"),
    ("general", "1", "not a key of a dataset"),
]


def cases(table: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    return [
        (key, value, fault) for keys, values, fault in table for key in keys.split() for value in values.split("; ")
    ]


@pytest.mark.parametrize(("key", "value", "fault"), cases(IN_SUBSETS))
def test_a_wrong_value_is_reported_with_its_line(tmp_path: Path, key: str, value: str, fault: str) -> None:
    image_dir = "" if key == "image_dir" else "image_dir = 'a'"
    mistake = only(read(tmp_path, f"[[datasets]]\n[[datasets.subsets]]\n{image_dir}\n{key} = {value}\n"))
    assert fault in mistake.what and "(data.toml, line 4)" in mistake.what
    assert mistake.what.startswith(f"{key} = ") and mistake.remedy


@pytest.mark.parametrize(("key", "value", "fault"), cases(IN_DATASETS))
def test_a_wrong_value_of_a_dataset_is_reported_with_its_line(tmp_path: Path, key: str, value: str, fault: str) -> None:
    mistake = only(read(tmp_path, f"[[datasets]]\n{key} = {value}\n[[datasets.subsets]]\nimage_dir = 'a'\n"))
    assert fault in mistake.what and "(data.toml, line 2)" in mistake.what
    assert mistake.what.startswith(f"{key} = ") and mistake.remedy


def test_two_keys_for_one_thing_in_one_table(tmp_path: Path) -> None:
    text = "[[datasets]]\nresolution = 512\nbatch_size = 2\nresolutions = [512]\npixels_per_batch = 9\n"
    found = read(tmp_path, text + "[[datasets.subsets]]\nimage_dir = 'a'\n")
    whats = [mistake.what for mistake in found.mistakes]
    assert whats == [
        "resolution (data.toml, line 2) and resolutions (data.toml, line 4) are both set",
        "batch_size (data.toml, line 3) and pixels_per_batch (data.toml, line 5) are both set",
    ]


@pytest.mark.parametrize(
    ("general", "fault"),
    [
        ("resolution = 1280\n", "is larger than max_bucket_reso = 1024 (command line)"),
        ("resolution = 512\nmin_bucket_reso = 640\n", "smaller than min_bucket_reso = 640 (data.toml, line 4)"),
        ("resolutions = [512, 2048]\n", "2048 of resolutions (data.toml, line 3) is larger than"),
        ("min_bucket_reso = 2048\n", "min_bucket_reso = 2048 (data.toml, line 3) is more than max_bucket_reso = 1024"),
    ],
)  # fmt: skip
def test_buckets_that_cannot_hold_the_resolution(tmp_path: Path, general: str, fault: str) -> None:
    mistake = only(read(tmp_path, f"[general]\nenable_bucket = true\n{general}{PLAIN}"))
    assert fault in mistake.what and mistake.remedy
    no_upscale = read(tmp_path, f"[general]\nbucket_no_upscale = true\nenable_bucket = true\n{general}{PLAIN}")
    assert not no_upscale.mistakes  # limits then have no meaning


def test_a_wrong_resolution_is_not_reported_as_missing(tmp_path: Path) -> None:
    path = tmp_path / "data.toml"
    path.write_text(f"[general]\nresolution = '512'\n{PLAIN}", encoding="utf-8")
    found = read_kohya(path, replace(DEFAULTS, buckets=BucketSettings((0, 0))))
    assert "is not a resolution" in only(found).what and found.datasets


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("keep_token", "did you mean keep_tokens?"),
        ("color-aug", "did you mean color_aug?"),
        ("Flip_Aug", "did you mean flip_aug?"),
        ("resolutoin", "did you mean resolution? It belongs to general or to a dataset"),
        ("dataset_repeats", "write num_repeats"),
        ("train_data_dir", "write image_dir"),
        ("max_token_length", "command line"),
        ("cache_latents", "command line"),
        ("skip_image_resolution", "this version does not support it"),
        ("is_val", "write validation = true"),
        ("multires_training", "write resolutions = [512, 768, 1024]"),
        ("xyzzy", "the keys of a subset are "),
    ],
)
def test_the_remedy_for_an_unknown_key(tmp_path: Path, key: str, remedy: str) -> None:
    mistake = only(read(tmp_path, f"{PLAIN}{key} = 1\n"))
    assert mistake.what == f"{key} = 1 (data.toml, line 4) is not a key of a subset" and remedy in mistake.remedy


def test_every_key_with_a_letter_missing_is_recognised(tmp_path: Path) -> None:
    for name, key in KEYS.items():
        level = key.levels[-1]
        miss = name[:3] + name[4:]
        head = {"general": f"[general]\n{miss} = 1\n", "dataset": f"[[datasets]]\n{miss} = 1\n", "subset": ""}[level]
        body = PLAIN.removeprefix("[[datasets]]\n") if level == "dataset" else PLAIN
        tail = f"{miss} = 1\n" if level == "subset" else ""
        kind = "metadata_file = 'm'\n" if "fine-tuning" in key.kinds and len(key.kinds) == 1 else ""
        mistake = only(read(tmp_path, head + body + kind + tail))
        assert f"did you mean {name}?" in mistake.remedy


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "describes no dataset"),
        ("[general]\nflip_aug = true\n", "describes no dataset"),
        ("datasets = []\n", "describes no dataset"),
        ("datasets = 5\n", "datasets (data.toml, line 1) is not a list of tables"),
        ("[datasets]\n", "datasets (data.toml, line 1) is not a list of tables"),
        ("datasets = [1]\n", "a member of datasets (data.toml, line 1) is not a table"),
        ("\n[[datasets]]\nresolution = 512\n", "the dataset has no subsets (data.toml, line 2)"),
        ("[[datasets]]\nsubsets = []\n", "the dataset has no subsets (data.toml, line 2)"),
        ("[[datasets]]\n[datasets.subsets]\nimage_dir = 'a'\n", "subsets (data.toml, line 2) is not a list of tables"),
        ("[[datasets]]\n[[datasets.subsets]]\n", "the subset (data.toml, line 2) has no image_dir"),
        (f"[[general]]\n{PLAIN}", "general (data.toml, line 1) is not a table"),
        (f"general = 1\n{PLAIN}", "general (data.toml, line 1) is not a table"),
        (f"resolution = 512\n{PLAIN}", "resolution = 512 (data.toml, line 1) is not a top-level key"),
        (f"{PLAIN}[[subsets]]\nimage_dir = 'a'\n", "(data.toml, line 4) is not a top-level key"),
        (f"{PLAIN}num_repeats = 0\n", "leaves nothing to train on"),
        (f"{PLAIN}is_reg = true\n", "the dataset (data.toml, line 1) has only subsets with is_reg = true"),
        (f"{PLAIN}conditioning_data_dir = 'm'\n", "(data.toml, line 4) requires --masked_loss"),
        (f"{PLAIN}[[datasets.subsets]]\nimage_dir = 'a'\nis_reg = true\n", "once with is_reg = true and once without"),
        (f"{PLAIN}[[datasets.subsets]]\nimage_dir = 'a'\nvalidation = true\n", "once with validation = true and once "),
        (
            f"{PLAIN}is_reg = true\n[[datasets.subsets]]\nimage_dir = 'b'\nvalidation = true\n",
            "the dataset (data.toml, line 1) has only subsets with is_reg = true",
        ),
        (f"{PLAIN}custom_attributes.x = 1\n", "x = 1 (data.toml, line 4) is not a key of custom_attributes"),
        (f"{PLAIN}custom_attributes.diff_output_preservation = 1\n", "line 4) is neither true nor false"),
        (f"{PLAIN}[[datasets.subsets]]\nmetadata_file = 'm'\n", "(line 5) and subsets without"),
        ("[[datasets]]\nclass_tokens = 'x'\n[[datasets.subsets]]\nmetadata_file = 'm'\n", "line 2) has no meaning"),
        ("[[datasets]]\n[[datasets.subsets]]\nmetadata_file = 'm'\nis_reg = true\n", "line 4) has no meaning"),
    ],
)  # fmt: skip
def test_a_file_without_datasets_or_with_the_wrong_contents(tmp_path: Path, text: str, fault: str) -> None:
    mistake = only(read(tmp_path, text))
    assert fault in mistake.what and mistake.remedy


def test_a_subset_compared_with_the_base_model_leads_to_the_anchor(tmp_path: Path) -> None:
    mistake = only(read(tmp_path, f"{PLAIN}custom_attributes = {{ diff_output_preservation = true }}\n"))
    assert "diff_output_preservation = true (data.toml, line 4)" in mistake.what
    assert "--preservation base_prediction" in mistake.remedy


def test_two_places_for_the_masks_of_one_subset(tmp_path: Path) -> None:
    text = f"{PLAIN}conditioning_data_dir = 'm'\nalpha_mask = true\n"
    assert only(read(tmp_path, text, masked_loss=True)).what == (
        "alpha_mask (data.toml, line 5) and conditioning_data_dir (data.toml, line 4) are both set: "
        "a subset has one source of masks"
    )


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("data.toml", b"[general]\nx = = 1\n[[datasets", "is not valid TOML: Invalid value (at line 2, column 5)"),
        ("data.toml", b"x = 1\nx = 2\n", "(at line 2, column 6)"),
        ("data.json", b'{"datasets": [\n{"a": 1,}]}', "(at line 2, column"),
        ("data.json", b"", "is not valid JSON: Expecting value (at line 1, column 1)"),
        ("data.json", b"[]", "data.json contains no table"),
        ("data.json", b'{"datasets": "\\ud83d"}', "contains half a character"),
        ("data.toml", "x = 1\n# Größe".encode("latin-1"), "is not in UTF-8 (line 2, byte 10)"),
        ("data.toml", "x = 1".encode("utf-16"), "is not in UTF-8 (line 1, byte 0)"),
        ("data.json", b"[" * 100_000, "nests lists or tables too deeply"),
        ("data.yaml", b"", "is neither a .toml nor a .json file"),
        ("data", b"", "is neither a .toml nor a .json file"),
    ],
)
def test_an_unreadable_file_is_one_mistake(tmp_path: Path, name: str, content: bytes, fault: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    found = read_kohya(path, DEFAULTS)
    assert fault in only(found).what and only(found).remedy and found.datasets == ()


def test_a_file_that_is_not_there_or_is_a_folder(tmp_path: Path) -> None:
    assert "there is no such file" in only(read_kohya(tmp_path / "x.toml", DEFAULTS)).what
    (tmp_path / "y.toml").mkdir()
    assert "is a folder" in only(read_kohya(tmp_path / "y.toml", DEFAULTS)).what


def test_any_json_gives_mistakes_and_no_traceback(tmp_path: Path) -> None:
    wrong: list[Any] = [None, True, 0, -1, 1.5, "", "x", [], [1], [[]], {}, {"x": {}}, [{}]]
    path = tmp_path / "data.json"
    for value in wrong:
        trees: list[Any] = [value, {"general": value}, {"datasets": value}, {"datasets": [value]}]
        trees += [{"datasets": [{"subsets": value}]}, {"datasets": [{"subsets": [value]}]}, {"x": value}]
        for name in [*KEYS, "no key"]:
            table = {name: value}
            trees += [{"general": table}, {"datasets": [{**table, "subsets": [{"image_dir": "a", **table}]}]}]
        for tree in trees:
            path.write_text(json.dumps(tree), encoding="utf-8")
            found = read_kohya(path, DEFAULTS, masked_loss=True)
            assert found.mistakes or found.datasets
            assert all(str(mistake) for mistake in found.mistakes)
