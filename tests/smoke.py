"""Both recipes from the model to an image, in little time: `python -m tests.lowest_versions` runs it with old packages.

Its name keeps it out of the usual run of all tests, which covers the same in more detail with the newest packages.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gen_img
import train_db
import train_network
from library.training.recipe import Recipe
from tests import tiny
from tests.training.running import World, run
from tools import convert_checkpoint, merge_lora

FAMILIES = ("sd1", "sdxl")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    for family in FAMILIES:
        tiny.write_single_file(root / f"{family}.safetensors", family)
    tiny.write_images(root / "train" / "1_sks dog", 2)
    return World(root)


def train(
    world: World, capsys: pytest.CaptureFixture[str], recipe: Recipe, out: Path, model: Path, **flags: object
) -> Path:
    """Two steps; returns the file."""
    words = world.arguments(
        out,
        pretrained_model_name_or_path=model,
        max_train_steps=2,
        gradient_checkpointing=True,
        save_state=True,
        **flags,
    )
    outcome = run(words, capsys, recipe)
    assert outcome.code == 0, outcome.err
    assert sorted(outcome.losses) == [1, 2]
    return out / "dog.safetensors"


def draw(model: Path, out: Path, *words: str) -> bytes:
    words = ("--prompt", "a photo of sks dog", "--steps", "2", "--W", "64", "--H", "64", "--seed", "1", *words)
    assert gen_img.main(["--ckpt", str(model), "--outdir", str(out), *words]) == 0
    (image,) = out.glob("*.png")
    return image.read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_is_trained_and_loaded_again(
    world: World, family: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = world.root / f"{family}.safetensors"
    trained = train(
        world,
        capsys,
        train_db.RECIPE,
        tmp_path / "out",
        source,
        train_text_encoder=True,
        clip_skip=2 if family == "sd1" else None,
    )
    before, after = load_file(source), load_file(trained)
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    for part in ("model.diffusion_model.", "cond_stage_model." if family == "sd1" else "conditioner.embedders.1."):
        assert any(name.startswith(part) for name in changed), part
    folder = tmp_path / "folder"
    assert convert_checkpoint.main([str(trained), str(folder)]) == 0
    assert draw(trained, tmp_path / "file") == draw(folder, tmp_path / "of a folder")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_trained_continued_and_merged(
    world: World, family: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = world.root / f"{family}.safetensors"
    flags = {"network_module": "networks.lora", "network_dim": 2, "network_args": ["conv_dim=2"], "cache_latents": True}
    first = train(world, capsys, train_network.RECIPE, tmp_path / "first", source, **flags)
    second = train(
        world,
        capsys,
        train_network.RECIPE,
        tmp_path / "second",
        source,
        network_weights=first,
        learning_rate=1e-1,
        **flags,
    )
    assert load_file(first).keys() == load_file(second).keys()
    merged = tmp_path / "merged.safetensors"
    words = ["--sd_model", str(source), "--models", str(second), "--ratios", "1", "--save_to", str(merged)]
    assert merge_lora.main(words) == 0
    assert draw(merged, tmp_path / "merged") != draw(source, tmp_path / "base")
