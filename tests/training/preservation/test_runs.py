"""Anchors in real trainings: left out, resumed, with captions encoded ahead, and logged."""

from __future__ import annotations

from pathlib import Path

import pytest

import train_network
from library.training.preservation.base import Base
from tests.training.running import Outcome, World, assert_equal_files, make_world, run
from tools import cache_text_encoder_outputs

# 8 training samples and 8 of regularisation in one bucket
COMMON = {
    "network_module": "networks.lora",
    "network_dim": 2,
    "train_batch_size": 4,
    "learning_rate": 1e-2,
    "use_safetensors": None,
}
ALL = ["reg_images", "base_prediction=0.5", "class_prompt@2-", "blank_prompt=0.1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def train(world: World, out: Path, capsys: pytest.CaptureFixture[str], **flags: object) -> Outcome:
    chosen = {**COMMON, "reg_data_dir": world.root / "reg", **flags}
    outcome = run(world.arguments(out, **chosen), capsys, train_network.RECIPE)
    assert outcome.code == 0, outcome.err
    return outcome


def test_a_weight_of_0_changes_nothing_bit_for_bit(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the base does not compute."""
    monkeypatch.setattr(Base, "__call__", lambda *given: pytest.fail("the base computes"))
    plain = train(world, tmp_path / "plain", capsys, max_train_steps=2)
    off = ["reg_images", "base_prediction=0", "class_prompt=0", "blank_prompt=0@1-"]
    other = train(world, tmp_path / "off", capsys, max_train_steps=2, preservation=off)
    assert plain.losses == other.losses and len(plain.losses) == 2
    assert_equal_files(tmp_path / "plain" / "dog.safetensors", tmp_path / "off" / "dog.safetensors")


def test_resumed_is_uninterrupted(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With dropout, which draws from the global generator, and a text encoder that is trained. The anchors stay."""
    flags = {"preservation": ALL, "network_dropout": 0.3, "max_train_steps": 3, "gradient_accumulation_steps": 2}
    whole = train(world, tmp_path / "whole", capsys, **flags, save_every_n_steps=2, save_state=True)
    state = tmp_path / "whole" / "dog-step00000002-state"
    rest = train(world, tmp_path / "rest", capsys, **flags, resume=state)
    assert rest.losses == {3: whole.losses[3]}
    assert_equal_files(tmp_path / "whole" / "dog.safetensors", tmp_path / "rest" / "dog.safetensors")
    changed = run(
        world.arguments(tmp_path / "x", **{**COMMON, "reg_data_dir": world.root / "reg"}, **{**flags, "preservation":
                        ALL[:2]}, resume=state), capsys, train_network.RECIPE,
    )  # fmt: skip
    assert changed.code == 2 and "what --preservation chooses was" in changed.err


def test_class_prompts_are_encoded_ahead(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the images "zwx cat", "sks dog", the caption of a file and "dog"; with the class "cat" and that caption; and
    the blank one. The "dog" of "sks dog" is there already."""
    flags = {
        **COMMON, "reg_data_dir": world.root / "reg", "preservation": ALL, "max_train_steps": 2,
        "cache_text_encoder_outputs_to_disk": True, "network_train_unet_only": True,
        "data_cache_dir": tmp_path / "cache",
    }  # fmt: skip
    words = world.arguments(tmp_path / "out", **{**flags, "output_name": None})
    capsys.readouterr()
    assert cache_text_encoder_outputs.main([word for word in words if not word.startswith("--output_dir")]) == 0
    assert "captions: 0 read, 7 encoded" in capsys.readouterr().out
    outcome = train(world, tmp_path / "out", capsys, **flags)
    assert "captions: 7 read, 0 encoded" in outcome.out + outcome.err
