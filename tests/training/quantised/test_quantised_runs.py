"""Adapters over a quantised base in whole runs. Previews and validation of one: tests/training/preview, validation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_network
from library.checkpoints.header import CheckpointError
from library.families.family import Model
from library.runtime.packed_weight import PackedWeight
from library.training import session
from library.training.saving.model_file import write_model
from library.training.trainable import SavedAt
from tests.training.running import Outcome, World, assert_equal_files, make_world, run

LORA = {"network_module": "networks.lora", "network_dim": 2, "network_alpha": 2, "max_train_steps": 2}
NF4 = {"base_model_precision": "nf4", "text_encoder_1_precision": "int8"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[Model]:
    """The models that runs have loaded."""
    found: list[Model] = []
    prepare = session.prepare

    def recording(model: Model, *others: Any) -> None:
        found.append(model)
        prepare(model, *others)

    monkeypatch.setattr(session, "prepare", recording)
    return found


def train(world: World, out: Path, capsys: pytest.CaptureFixture[str], **flags: object) -> Outcome:
    outcome = run(world.arguments(out, **{**LORA, **flags}), capsys, train_network.RECIPE)
    assert outcome.code == 0, outcome.err
    return outcome


def weights(model: Model, path: str = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q") -> torch.Tensor:
    weight: torch.Tensor = model.backbone.get_submodule(path).weight
    assert isinstance(weight, PackedWeight)
    return weight.unpacked()


@pytest.mark.parametrize("name", ["int8-quanto", "int4-quanto", "int8-torchao", "fp8-torchao"])
def test_the_loss_changes_by_the_rounding(
    name: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], models: list[Model]
) -> None:
    """Of 8 bits by less than a hundredth, of 4 by more, and never not at all."""
    flags = {"max_train_steps": 1, "network_train_unet_only": True}
    full = train(world, tmp_path / "full", capsys, **flags).losses[1]
    small = train(world, tmp_path / "small", capsys, **flags, base_model_precision=name).losses[1]
    assert small == pytest.approx(full, rel=0.1 if "int4" in name else 0.01) and small != full
    kept = [one for module in (models[1].backbone, models[1].vae) for one in module.parameters()]
    assert not any(one.requires_grad for one in kept)
    assert sum(isinstance(one, PackedWeight) for one in kept) > 100


def test_a_quantised_model_is_never_saved(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], models: list[Model]
) -> None:
    train(world, tmp_path / "out", capsys, max_train_steps=1, base_model_precision="int8")
    facts: Any = None  # it is refused before anything is asked
    with pytest.raises(CheckpointError, match="a quantised model cannot be saved"):
        write_model(facts, models[0], print, tmp_path / "model.safetensors", "safetensors", SavedAt(1, 1))
    assert not (tmp_path / "model.safetensors").exists()


def test_resumed_is_uninterrupted(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And another format is refused, which would be another model."""
    flags = {**NF4, "network_dropout": 0.3, "mixed_precision": "bf16", "gradient_checkpointing": True}
    whole = train(world, tmp_path / "whole", capsys, **flags, save_every_n_steps=1, save_state=True)
    state = tmp_path / "whole" / "dog-step00000001-state"
    rest = train(world, tmp_path / "rest", capsys, **flags, resume=state)
    assert rest.losses == {2: whole.losses[2]}
    assert_equal_files(tmp_path / "whole" / "dog.safetensors", tmp_path / "rest" / "dog.safetensors")
    other = {**LORA, **flags, "base_model_precision": "int8", "resume": state}
    refused = run(world.arguments(tmp_path / "other", **other), capsys, train_network.RECIPE)
    assert refused.code != 0 and "base_model_precision" in refused.err


def test_adapters_are_merged_before_quantising(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], models: list[Model]
) -> None:
    """A merged difference of half a step of int8 would be lost in weights that are quantised already."""
    train(world, tmp_path / "first", capsys, max_train_steps=1)
    file = load_file(tmp_path / "first" / "dog.safetensors")
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    with torch.no_grad():
        for name in file:
            if "lora_up" in name:
                file[name].normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    save_file(file, tmp_path / "merged.safetensors")
    scale = float(file[f"{layer}.alpha"]) / 2
    delta = scale * file[f"{layer}.lora_up.weight"] @ file[f"{layer}.lora_down.weight"]
    before = models[0].backbone.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q").weight
    train(
        world, tmp_path / "second", capsys, max_train_steps=1, base_weights=tmp_path / "merged.safetensors",
        base_model_precision="int8",
    )  # fmt: skip
    expected = before.detach() + delta
    step = expected.abs().amax(1, keepdim=True) / 127
    assert float(((weights(models[1]) - expected).abs() / step).max()) < 0.51


def test_a_probe_lists_the_worst_layers_and_changes_nothing(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], models: list[Model]
) -> None:
    flags = {
        "base_model_precision": "int4", "network_dropout": 0.3, "network_args": ["module_dropout=0.3"],
        "preservation": "base_prediction", "reg_data_dir": world.root / "reg", "train_batch_size": 4,
    }  # fmt: skip
    plain = train(world, tmp_path / "plain", capsys, **flags)
    probed = train(world, tmp_path / "probed", capsys, **flags, quantise_probe=True)
    assert probed.losses == plain.losses
    assert_equal_files(tmp_path / "plain" / "dog.safetensors", tmp_path / "probed" / "dog.safetensors")
    said = probed.err + probed.out
    assert re.search(r"relative error of the prediction \d+\.\d\d%, of a layer's output \d+\.\d\d% on average", said)
    listed = re.findall(r"^.*?(\d+\.\d\d)%  unet\.\S+", said, re.MULTILINE)
    assert len(listed) == 10 and [float(one) for one in listed] == sorted(map(float, listed), reverse=True)
    kept = [one for one in models[1].backbone.parameters() if isinstance(one, PackedWeight)]
    assert kept and all(one.full is None for one in kept), "the full weights are freed"
    assert "quantise_probe" not in plain.err + plain.out
