"""Whole runs that evaluate train as if they did not."""

from __future__ import annotations

from pathlib import Path

import pytest

import train_db
import train_network
from tests.evaluation import tiny_encoders
from tests.training.running import World, assert_equal_files, make_world, run

CASES = {
    "all weights": {},
    "adapter, captions cached": {
        "network_module": "networks.lora",
        "network_train_unet_only": True,
        "cache_latents": True,
        "cache_text_encoder_outputs": True,
        "use_ema": True,
    },
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    tiny_encoders.write_dinov2(world.root / "dino")
    tiny_encoders.write_clip(world.root / "clip")
    lines = ("a {subject} --w 64 --h 64 --s 1", "a sks dog, red --w 64 --h 128 --s 1 --l 1")
    (world.root / "scenes.txt").write_text("\n".join(lines), encoding="utf-8")
    return world


@pytest.mark.parametrize("flags", CASES.values(), ids=CASES)
def test_evaluating_does_not_affect_training(
    flags: dict[str, object], world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = train_network.RECIPE if "network_module" in flags else train_db.RECIPE
    evaluated = {
        "evaluation_prompts": world.root / "scenes.txt",
        "evaluation_dino": world.root / "dino",
        "evaluation_clip": world.root / "clip",
        "evaluation_subject": "sks dog",
        "evaluation_class": "dog",
        "evaluate_every_n_steps": 1,
    }
    without = run(world.arguments(tmp_path / "without", max_train_steps=2, **flags), capsys, recipe)
    outcome = run(world.arguments(tmp_path / "with", max_train_steps=2, **flags, **evaluated), capsys, recipe)
    assert without.code == outcome.code == 0, without.err + outcome.err
    said = outcome.err
    for start in ("base model: DINO", "step 1: DINO", "step 2: DINO", "the real images among themselves: DINO"):
        assert start in said, said
    assert "no evaluation" not in said and said.count("step 2 with the EMA: DINO") == ("use_ema" in flags)
    assert without.losses == outcome.losses
    assert_equal_files(tmp_path / "without" / "dog.safetensors", tmp_path / "with" / "dog.safetensors")
