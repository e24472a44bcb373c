"""Dataset files in both formats through the whole command: plan, training and mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from library.options.mistakes import UserError
from library.options.parse import parse
from library.training.plan.plan import decide
from tests import tiny
from tests.training.running import Outcome, World, assert_equal_files, make_world, run

ROOT = Path(__file__).parents[2]

# Samples of an epoch: 3 images x 2 and as many of regularisation in batches of 2, 6 batches; 2 images x 3 at two
# resolutions, in batches of 4 and of 3, 2 batches each.
TOML = """
[general]
caption_extension = ".txt"
[[datasets]]
resolution = 64
batch_size = 2
shuffle_caption = true
keep_tokens = 1
  [[datasets.subsets]]
  image_dir = '{dog}'
  num_repeats = 2
  enable_wildcard = true
  caption_tag_dropout_rate = 0.2
  token_warmup_min = 1
  token_warmup_step = 6
  flip_aug = true
  [[datasets.subsets]]
  image_dir = '{reg}'
  is_reg = true
  class_tokens = "dog"
[[datasets]]
resolutions = [64, [64, 128]]
batch_size = [4, 3]
  [[datasets.subsets]]
  image_dir = '{cat}'
  num_repeats = 3
  class_tokens = "cat"
  caption_prefix = "zwx"
"""
BATCHES = 6 + 2 + 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    captions = (
        "a {small|big} sks dog, grass, sky, sun\nsks dog, snow, ice",
        "sks dog, {red|blue} ball, park",
        "sks dog",
    )
    for path, caption in zip(sorted(folder(world, "dog").glob("*.png")), captions, strict=True):
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    tiny.write_images(world.root / "masks", 3, size=(80, 64), seed=5)
    return world


def folder(world: World, name: str) -> Path:
    return world.root / {"dog": "train/2_sks dog", "cat": "train/1_zwx cat", "reg": "reg/1_dog"}[name]


def toml(world: World) -> str:
    return TOML.format(**{name: folder(world, name).as_posix() for name in ("dog", "cat", "reg")})


def arguments(world: World, out: Path, **flags: object) -> list[str]:
    """The command line of a dataset file: nothing that the file says."""
    unsaid = dict.fromkeys(("train_data_dir", "resolution", "caption_extension"))
    return world.arguments(out, **{**unsaid, "data_cache_dir": world.root / "remembered", **flags})


def train(world: World, capsys: pytest.CaptureFixture[str], out: Path, **flags: object) -> Outcome:
    outcome = run(arguments(world, out, **flags), capsys)
    assert outcome.code == 0, outcome.err
    return outcome


def write(path: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def test_toml_and_json_are_one_run_as_counted_by_hand(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write(tmp_path / "data.toml", toml(world)), write(tmp_path / "data.json", tomllib.loads(toml(world)))
    flags = {"max_train_epochs": 1, "prior_loss_weight": 0.5}
    first, second = (train(world, capsys, tmp_path / file.suffix[1:], dataset_config=file, **flags) for file in files)
    assert sorted(first.losses) == list(range(1, BATCHES + 1)) and first.losses == second.losses
    assert_equal_files(tmp_path / "toml" / "dog.safetensors", tmp_path / "json" / "dog.safetensors")
    for expected in (
        "2_sks dog: 3 images x 2 = 6 samples, training, captions from files",
        "1_dog: 3 images, 6 samples after balancing, regularisation",
        '1_zwx cat: 2 images x 3 = 6 samples, training, all captioned "cat", at each of 2 resolutions',
        "64x64: 12, in batches of up to 2",
        "64x64: 6, in batches of up to 4",
        "64x128: 6, in batches of up to 3",
        f"{BATCHES} batches per epoch",
        'prefix and suffix: "zwx ..."',
        "token warm-up: 1 tag at first, all tags after 6 steps",
        "tags shuffled, except the first",
        "prior loss weight 0.5",
    ):
        assert expected in first.out, f"{expected}\n---\n{first.out}"


def test_simpletuners_file_is_the_same_as_kohyas(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With masks and regularisation, each by its own rules: repeats = 1 there shows an image twice."""
    size = {"resolution": 64, "resolution_type": "pixel", "crop": True, "crop_aspect": "square", "crop_style": "center"}
    entries = [
        {"id": "dogs", "type": "local", "instance_data_dir": str(folder(world, "dog")), "repeats": 1, **size,
         "caption_strategy": "textfile", "conditioning_data": "white"},
        {"id": "white", "type": "local", "dataset_type": "conditioning", "conditioning_type": "mask",
         "instance_data_dir": str(world.root / "masks")},
        {"id": "other dogs", "type": "local", "instance_data_dir": str(folder(world, "reg")), **size,
         "caption_strategy": "instanceprompt", "instance_prompt": "dog", "is_regularisation_data": True},
        {"id": "words", "type": "local", "dataset_type": "text_embeds", "cache_dir": "cache", "default": True},
    ]  # fmt: skip
    same = {
        "general": {"caption_extension": ".txt"},
        "datasets": [{
            "resolution": 64,
            "subsets": [
                {"image_dir": str(folder(world, "dog")), "num_repeats": 2, "enable_wildcard": True,
                 "conditioning_data_dir": str(world.root / "masks")},
                {"image_dir": str(folder(world, "reg")), "is_reg": True, "class_tokens": "dog"},
            ],
        }],
    }  # fmt: skip
    flags = {"max_train_epochs": 1, "train_batch_size": 4, "masked_loss": True, "prior_loss_weight": 0.5}
    flags["preservation"] = "reg_images"  # SimpleTuner compares with the base model
    backend = write(tmp_path / "multidatabackend.json", entries)
    theirs = train(world, capsys, tmp_path / "theirs", data_backend_config=backend, **flags)
    ours = train(world, capsys, tmp_path / "ours", dataset_config=write(tmp_path / "data.json", same), **flags)
    assert sorted(theirs.losses) == [1, 2, 3] and theirs.losses == ours.losses
    assert "masked" in theirs.out and "prior loss weight 0.5" in theirs.out
    white = train(world, capsys, tmp_path / "plain", dataset_config=_without_masks(tmp_path, same), **flags)
    assert white.losses != ours.losses


def _without_masks(place: Path, content: dict[str, Any]) -> Path:
    less = json.loads(json.dumps(content))
    del less["datasets"][0]["subsets"][0]["conditioning_data_dir"]
    return write(place / "without.json", less)


def test_metadata_and_plain_folders_by_flags_are_what_a_file_says(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cat = folder(world, "cat")
    entries = {"image_00.png": {"caption": "a cat", "tags": "red, big"}, "image_01.png": {"tags": "zwx"}}
    metadata = write(tmp_path / "meta.json", entries)
    flags: dict[str, object] = {"max_train_epochs": 1, "train_batch_size": 2}
    size: dict[str, object] = {"resolution": 64, "caption_extension": ".txt", "train_data_dir": cat}
    by_flags = train(world, capsys, tmp_path / "1", **flags, **size, in_json=metadata, dataset_repeats=3)
    listed = {"image_dir": str(cat), "metadata_file": str(metadata), "num_repeats": 3}
    file = write(tmp_path / "1.json", {"datasets": [{"resolution": 64, "subsets": [listed]}]})
    assert by_flags.losses == train(world, capsys, tmp_path / "2", **flags, dataset_config=file).losses
    assert sorted(by_flags.losses) == [1, 2, 3]
    assert "captions from the metadata file" in by_flags.out

    plain = train(world, capsys, tmp_path / "3", **flags, **size, class_tokens="zwx cat", num_repeats=2)
    listed = {"image_dir": str(cat), "class_tokens": "zwx cat", "num_repeats": 2}
    file = write(tmp_path / "2.json", {"datasets": [{"resolution": 64, "subsets": [listed]}]})
    assert plain.losses == train(world, capsys, tmp_path / "4", **flags, dataset_config=file).losses
    assert sorted(plain.losses) == [1, 2] and '2 images x 2 = 4 samples, training, all captioned "zwx cat"' in plain.out


def test_resumed_in_the_middle_of_an_epoch(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """10 batches in windows of 3 are 4 steps an epoch: step 6 is the second of epoch 2, and the warm-up ends there."""
    file = write(tmp_path / "data.toml", toml(world))
    flags = {
        "dataset_config": file, "gradient_accumulation_steps": 3, "max_train_steps": 8, "cache_latents_to_disk": True,
        "caption_dropout_rate": 0.1,
    }  # fmt: skip
    whole = train(world, capsys, tmp_path / "whole", **flags, save_every_n_steps=6, save_state=True)
    state = tmp_path / "whole" / "dog-step00000006-state"
    rest = train(world, capsys, tmp_path / "rest", **flags, resume=state)
    assert sorted(rest.losses) == [7, 8]
    assert rest.losses == {step: whole.losses[step] for step in rest.losses}
    assert_equal_files(tmp_path / "whole" / "dog.safetensors", tmp_path / "rest" / "dog.safetensors")
    # 3 training images with their mirror images, 3 of regularisation, 2 at two sizes
    assert "0 read, 10 encoded" in whole.err and "10 read, 0 encoded" in rest.err

    for change in (("keep_tokens = 1", "keep_tokens = 2"), ("batch_size = 2", "batch_size = 3")):
        assert change[0] in toml(world)
        other = write(tmp_path / "other.toml", toml(world).replace(*change))
        refused = run(arguments(world, tmp_path / "no", **{**flags, "dataset_config": other, "resume": state}), capsys)
        assert refused.code == 2 and not refused.losses
        assert str(state) in refused.err and "--dataset_config" in refused.err and "other.toml" in refused.err
    moved = write(tmp_path / "moved.toml", "# the same, elsewhere\n" + toml(world))
    assert decide(parse(arguments(world, tmp_path / "yes", **{**flags, "dataset_config": moved, "resume": state})))


@pytest.mark.parametrize("flag", ["cache_latents", "cache_latents_to_disk"])
@pytest.mark.parametrize("key", ["random_crop = true", "color_aug = true", "face_crop_aug_range = [2.0, 4.0]"])
def test_random_augmentation_excludes_cached_latents(key: str, flag: str, world: World, tmp_path: Path) -> None:
    text = toml(world).replace("num_repeats = 3", f"num_repeats = 3\n  {key}")
    line = text[: text.index("num_repeats = 3")].rpartition("[[datasets.subsets]]")[0].count("\n") + 1
    flags = {"dataset_config": write(tmp_path / "data.toml", text), "max_train_steps": 1}
    with pytest.raises(UserError) as raised:
        decide(parse(arguments(world, tmp_path / "out", **flags, **{flag: True})))
    (mistake,) = raised.value.mistakes
    name = key.partition(" ")[0]
    assert mistake.what.startswith(f"{name} (data.toml, line {line}) cannot be combined with --{flag}:")
    assert name in mistake.remedy and f"--{flag}" in mistake.remedy
    assert decide(parse(arguments(world, tmp_path / "out", **flags)))  # without the cache it is allowed


def test_random_crops_of_a_data_backend_exclude_cached_latents(world: World, tmp_path: Path) -> None:
    entry = {"id": "cats", "type": "local", "instance_data_dir": str(folder(world, "cat")), "resolution": 64,
             "resolution_type": "pixel", "crop": True, "caption_strategy": "instanceprompt",
             "instance_prompt": "cat"}  # fmt: skip
    file = write(tmp_path / "backend.json", [entry])
    with pytest.raises(UserError) as raised:
        decide(parse(arguments(world, tmp_path / "out", data_backend_config=file, cache_latents=True)))
    (mistake,) = raised.value.mistakes
    assert (
        'crop_style random (backend.json, line 1, "cats")' in mistake.what
        and '"crop_style": "center"' in mistake.remedy
    )


def test_crops_around_faces_have_no_effect_with_buckets(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in kohya's trainer; so they exclude nothing, and a note says so."""
    subset = {"image_dir": str(folder(world, "cat")), "face_crop_aug_range": [2.0, 4.0], "class_tokens": "cat"}
    buckets = {"enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 128}
    file = write(tmp_path / "data.json", {"datasets": [{"resolution": 64, **buckets, "subsets": [subset]}]})
    flags = {"dataset_config": file, "max_train_steps": 1, "cache_latents": True}
    assert "face_crop_aug_range (data.json, line 1) has no effect" in train(world, capsys, tmp_path, **flags).out


def test_mistakes_of_file_and_command_line_are_reported_together(world: World, tmp_path: Path) -> None:
    text = toml(world).replace("keep_tokens = 1", 'keep_token = 1\nmin_bucket_reso = "64"')
    text = text.replace(folder(world, "cat").as_posix(), (world.root / "nowhere").as_posix())
    (folder(world, "dog") / "not_used.caption").write_text("", encoding="utf-8")
    words = arguments(
        world, tmp_path, dataset_config=write(tmp_path / "data.toml", text), learning_rate="fast", save_state="maybe",
        pretrained_model_name_or_path=tmp_path / "no.safetensors", resume=tmp_path / "no state", mask_floor=2,
    )  # fmt: skip
    code = (
        "import sys, train_db; from library.training.command import run_recipe;"
        "code = run_recipe(train_db.RECIPE, sys.argv[1:]);"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'cv2') if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, encoding="utf-8", cwd=ROOT, timeout=60,
        env={**os.environ, "PYTHONUTF8": "1"},
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    lines = text.split("\n")
    for expected in (
        f"keep_token = 1 (data.toml, line {lines.index('keep_token = 1') + 1})",
        "did you mean keep_tokens?",
        'min_bucket_reso = "64" (data.toml, line',
        str(world.root / "nowhere"),
        "--learning_rate",
        "--mask_floor",
        str(tmp_path / "no.safetensors"),
        str(tmp_path / "no state"),
    ):
        assert expected in done.stderr, f"{expected}\n---\n{done.stderr}"
    assert done.stdout.strip() == "[]", "a mistake is reported before anything large is imported"
