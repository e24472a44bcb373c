"""finetune/: from captions beside images to a fine-tuned model, with the commands of kohya_ss's fine-tuning tab."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tomli_w

import fine_tune
from library.options.convert_values import convert
from library.options.tool_command import tool_flags
from library.options.train_options import FLAGS
from tests.data.image_files import save
from tests.training.running import World, make_world, run
from tools import (
    clean_captions_and_tags,
    merge_captions_to_metadata,
    merge_dd_tags_to_metadata,
    prepare_buckets_latents,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("wörld"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in (("a", (128, 128)), ("b", (192, 64))):
        path = save(tmp_path / "image folder" / f"{name}.png", size, "2girls, blue_eyes, red_eyes, shirt, white_shirt")
        path.with_suffix(".caption").write_text(f"a young woman and {name}", encoding="utf-8")
    return tmp_path / "image folder"


def in_form(folder: Path, world: World, *more: str) -> list[str]:
    """The words that the tab's form sends."""
    return [
        str(folder), str(folder.parent / "meta_cap.json"), str(folder.parent / "meta_lat.json"), str(world.model),
        "--batch_size", "1", "--max_resolution", "128,128", "--min_bucket_reso", "64", "--max_bucket_reso", "1024",
        "--mixed_precision", "bf16", "--full_path", *more,
    ]  # fmt: skip


def test_from_the_form_to_a_trained_model(
    world: World, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions, tagged, clean = (str(tmp_path / name) for name in ("meta_cap.json", "meta_dd.json", "meta_cap.json"))
    words = ["--caption_extension", ".caption", str(folder), captions, "--full_path"]
    assert merge_captions_to_metadata.main(words) == 0
    assert merge_dd_tags_to_metadata.main([str(folder), tagged, "--in_json", captions, "--full_path"]) == 0
    assert clean_captions_and_tags.main([tagged, clean]) == 0
    assert prepare_buckets_latents.main(in_form(folder, world, "--mixed_precision=no")) == 0

    # An area of 128 x 128 in steps of 64: 192 wide is 64 high (16384 / 192 = 85), both images have a size of their own.
    expected = {
        str(folder / f"{name}.png"): {
            "caption": f"a girl and {name}",
            "tags": "2girls, white shirt",
            "train_resolution": resolution,
        }
        for name, resolution in (("a", [128, 128]), ("b", [192, 64]))
    }
    assert (tmp_path / "meta_lat.json").read_text(encoding="utf-8") == json.dumps(expected, indent=2)
    with np.load(folder / "b_0192x0064_sd.npz") as cached:  # name and arrays of sd-scripts
        assert cached["latents"].shape == (4, 64 // 8, 192 // 8)
        assert cached["original_size"].tolist() == [192, 64] and cached["crop_ltrb"].tolist() == [0, 0, 192, 64]

    options = {
        "bucket_no_upscale": False, "bucket_reso_steps": 64, "cache_latents": True, "cache_latents_to_disk": True,
        "caption_dropout_every_n_epochs": 0, "caption_dropout_rate": 0, "caption_extension": ".caption",
        "dataset_repeats": 1, "enable_bucket": True, "flip_aug": False, "full_bf16": False, "full_fp16": False,
        "gradient_accumulation_steps": 1, "huber_c": 0.1, "huber_schedule": "snr",
        "in_json": f"{tmp_path}/meta_lat.json",
        "keep_tokens": 0, "learning_rate": 1e-3, "learning_rate_te": 1e-5, "loss_type": "l2",
        "lr_scheduler": "constant",
        "lr_scheduler_args": [], "lr_warmup_steps": 0, "max_bucket_reso": 1024, "max_timestep": 1000,
        "max_token_length": 75, "max_train_steps": 2, "min_bucket_reso": 64, "mixed_precision": "no",
        "multires_noise_discount": 0.3, "noise_offset_type": "Original", "optimizer_args": [],
        "optimizer_type": "AdamW",
        "output_dir": str(tmp_path / "out"), "output_name": "last", "persistent_data_loader_workers": 0,
        "pretrained_model_name_or_path": str(world.model), "resolution": "128,128", "sample_prompts": "",
        "sample_sampler": "euler_a", "save_every_n_epochs": 1, "save_model_as": "safetensors",
        "save_precision": "float",
        "seed": 1234, "train_batch_size": 1, "train_data_dir": str(folder), "train_text_encoder": True,
        "wandb_run_name": "last", "xformers": True,
    }  # fmt: skip
    config = tmp_path / "config_finetune.toml"
    config.write_text(tomli_w.dumps(options), encoding="utf-8")
    outcome = run(["--config_file", str(config)], capsys, fine_tune.RECIPE)
    assert outcome.code == 0 and len(outcome.losses) == 2, outcome.err
    assert "latents: 2 read, 0 encoded" in outcome.err
    assert (tmp_path / "out" / "last.safetensors").is_file()


def test_what_is_listed_is_encoded_and_the_rest_is_kept(
    world: World, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images that the file does not list have no caption: sd-scripts gives them an empty one. A second call encodes
    only what changed."""
    entries = {"b": {"caption": "b", "image_size": [192, 64]}}
    (tmp_path / "meta_cap.json").write_text(json.dumps(entries), encoding="utf-8")
    more = ["--mixed_precision=no", "--flip_aug", "--skip_existing", "--recursive", "--v2"]
    more += ["--max_data_loader_n_workers", "2"]
    for counts in ("0 read, 1 encoded", "1 read, 0 encoded"):
        assert prepare_buckets_latents.main(in_form(folder, world, *more)) == 0
        told = capsys.readouterr().out
        assert f"latents: {counts}" in told and re.search(r"1 image not\s+listed in meta_cap.json", told)
    entries["b"]["train_resolution"] = [192, 64]
    assert json.loads((tmp_path / "meta_lat.json").read_text(encoding="utf-8")) == entries
    with np.load(folder / "b_0192x0064_sd.npz") as cached:
        assert cached["latents_flipped"].shape == cached["latents"].shape


def test_mistakes_are_told_in_the_words_of_this_program(
    world: World, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = in_form(folder, world)
    words[words.index("128,128")] = "big"
    words[3] = str(tmp_path / "none.safetensors")
    assert prepare_buckets_latents.main(words) == 2
    told = capsys.readouterr().err
    assert "--max_resolution" in told and "--model_name_or_path" in told and "meta_cap.json" in told
    assert "--resolution" not in told and "--pretrained" not in told
    words = words[:4]
    words[3] = str(world.model)
    assert prepare_buckets_latents.main([*words, "--max_resolution=66", "--max_bucket_reso=1000"]) == 2
    told = capsys.readouterr().err
    assert '--max_resolution = "66,66" (command line) is smaller than --min_bucket_reso = 256 (default)' in told
    assert prepare_buckets_latents.main([str(folder), "a.json", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "is a folder" in told and "give the model fourth" in told


def test_the_plan_names_no_flag_that_nobody_gave(
    world: World, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "meta_cap.json").write_text(json.dumps({"b": {"caption": "b"}}), encoding="utf-8")
    words = [*in_form(folder, world)[:4], "--max_resolution=130", "--min_bucket_reso=64"]
    assert prepare_buckets_latents.main(words) == 0
    told = capsys.readouterr().out
    assert '--max_resolution = "130,130" (command line): only its area counts' in told
    assert not [name for name in ("--resolution", "cache_latents ", "enable_bucket", "max_bucket_reso") if name in told]


def test_the_defaults_are_those_of_the_training() -> None:
    """Those flags are not passed on."""
    tool = prepare_buckets_latents
    training = {name: flag.default for name, flag in FLAGS.items()} | tool._DEFAULTS
    for name in (*tool._NAMES, *tool._SAME):
        own = tool_flags(tool.BucketsOptions)[tool._NAMES.get(name, name)]
        if own.name not in tool.TOOL.positional:
            assert convert(FLAGS[name], own.default)[0] == training[name], name
