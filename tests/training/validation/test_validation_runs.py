"""Validation in whole runs: it changes nothing of the training, and its values are the same however a run is made."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import train_db
import train_network
from library.training.command import run_recipe
from library.training.recipe import Recipe
from library.training.validation.losses import Losses
from library.training.validation.plan import ValidationPlan
from library.training.validation.validation import Validation
from tests import tiny
from tests.training.running import World, assert_equal_files, make_world, run
from tools import cache_latents, cache_text_encoder_outputs

SPLIT = {"validation_split": 0.34, "max_train_steps": 3, "train_batch_size": 2}
LORA = {
    "network_module": "networks.lora", "network_dim": 2, "network_dropout": 0.3, "base_model_precision": "int8"
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """3 + 3 images to train on; one of each folder is held out."""
    root = tmp_path_factory.mktemp("world")
    made = make_world(root)
    tiny.write_images(root / "reg" / "1_dog", 2, size=(64, 64), seed=9)
    tiny.write_images(root / "train" / "1_zwx cat", 3, size=(64, 96), seed=3)
    return made


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Losses]:
    """What every validation gives."""
    found: list[Losses] = []
    measure = Validation.measure

    def recording(self: Validation, plan: ValidationPlan, held: Any) -> Losses:
        found.append(measure(self, plan, held))
        return found[-1]

    monkeypatch.setattr(Validation, "measure", recording)
    return found


@pytest.mark.parametrize(("recipe", "flags"), [(train_db.RECIPE, {}), (train_network.RECIPE, LORA)])
def test_a_run_with_validation_trains_as_one_without(
    recipe: Recipe,
    flags: dict[str, object],
    world: World,
    tmp_path: Path,
    measured: list[Losses],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a dropout, which draws from the generator that everything in torch draws from."""
    outcomes = []
    for name, cadence in (("with", {"validate_every_n_steps": 1}), ("without", {"validate_every_n_epochs": 1000})):
        outcomes.append(run(world.arguments(tmp_path / name, **SPLIT, **flags, **cadence), capsys, recipe))
        assert outcomes[-1].code == 0, outcomes[-1].err
        assert len(measured) == (4 if name == "with" else 5)  # the base model too
    assert outcomes[0].losses == outcomes[1].losses
    assert_equal_files(tmp_path / "with" / "dog.safetensors", tmp_path / "without" / "dog.safetensors")
    assert outcomes[0].err.count("validation loss") == 4
    assert not torch.equal(measured[0].held_out, measured[2].held_out)
    assert torch.equal(measured[0].held_out, measured[4].held_out)


def test_caches_change_no_value(
    world: World, tmp_path: Path, measured: list[Losses], capsys: pytest.CaptureFixture[str]
) -> None:
    frozen = {"network_train_unet_only": True, "network_dropout": 0}
    for name, caches in (
        ("nothing", {"shuffle_caption": True, "random_crop": True, "flip_aug": True}),
        ("caches", {"cache_latents_to_disk": True, "cache_text_encoder_outputs": True}),
    ):
        arguments = world.arguments(tmp_path / name, **SPLIT, **{**LORA, **frozen}, **caches, validate_every_n_steps=3)
        outcome = run([*arguments, "--learning_rate=1e-30"], capsys, train_network.RECIPE)
        assert outcome.code == 0, outcome.err
    base, without, _, cached = measured
    torch.testing.assert_close(base.held_out, without.held_out)  # an adapter begins as if it were off
    torch.testing.assert_close(without.held_out, cached.held_out)
    torch.testing.assert_close(without.trained, cached.trained)


def test_caches_filled_ahead_hold_validation_captions(
    world: World, tmp_path: Path, measured: list[Losses], capsys: pytest.CaptureFixture[str]
) -> None:
    """Captions are shuffled for the training and whole for the validation."""
    folder = tmp_path / "train"
    for path in tiny.write_images(folder / "1_dog", 6):
        path.with_suffix(".txt").write_text(f"{path.stem}, a, b, c, d, e", encoding="utf-8")
    caches = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True, "data_cache_dir": tmp_path}
    flags = {**SPLIT, **LORA, "network_train_unet_only": True, **caches, "shuffle_caption": True}
    words = world.arguments(tmp_path / "out", **flags, train_data_dir=folder, validate_every_n_steps=1)
    own = [word for word in words if not word.startswith(("--output_", "--network_"))]
    assert cache_latents.main(own) == 0 and cache_text_encoder_outputs.main([*own, "--learning_rate_te=0"]) == 0
    outcome = run(words, capsys, train_network.RECIPE)
    assert outcome.code == 0, outcome.err
    assert "latents: 6 read, 0 encoded" in outcome.err and " read, 0 encoded" in outcome.err
    assert len(measured) == 4


def test_a_resumed_run_validates_like_an_uninterrupted_one(
    world: World, tmp_path: Path, measured: list[Losses], capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole model is trained, so that the base model is gone: its values are in the state. The table goes on."""
    flags = {**SPLIT, "validate_every_n_steps": 2, "max_train_steps": 4, "reg_data_dir": world.root / "reg"}
    saving = {"save_every_n_steps": 2, "save_state": True}
    assert run(world.arguments(tmp_path / "whole", **flags, **saving), capsys).code == 0
    state = tmp_path / "whole" / "dog-step00000002-state"
    table = tmp_path / "whole" / "dog-validation.csv"
    (tmp_path / "rest").mkdir()
    shutil.copy(table, tmp_path / "rest")
    outcome = run(world.arguments(tmp_path / "rest", **flags, resume=state), capsys)
    assert outcome.code == 0, outcome.err
    assert len(measured) == 4  # of the base model, after steps 2 and 4, and after step 4 of the resumed run
    assert torch.equal(measured[2].held_out, measured[3].held_out)
    assert not torch.equal(measured[1].held_out, measured[2].held_out)
    assert (tmp_path / "rest" / "dog-validation.csv").read_bytes() == table.read_bytes()
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    assert [(row["step"], row["version"], row["set"]) for row in rows[::9]] == [
        (step, version, of_set)
        for step, version in (("0", "base"), ("2", "model"), ("4", "model"))
        for of_set in ("held_out", "training", "class")
    ]
    for change in ({"validation_split": 0.67}, {"validation_split": 0}):
        other = {**flags, "resume": state, "dry_run": True, **change}
        outcome = run(world.arguments(tmp_path / "rest", **other), capsys)
        assert outcome.code == 2 and "images, captions, repeats or scores" in outcome.err


def test_logs_have_the_names_of_sd_scripts(world: World, tmp_path: Path) -> None:
    """In an event file, at the number of the epoch."""
    from accelerate.state import AcceleratorState
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = {**SPLIT, "max_train_epochs": 2, "logging_dir": tmp_path / "logs", "max_validation_steps": 1}
    AcceleratorState._reset_state(True)
    assert run_recipe(train_db.RECIPE, world.arguments(tmp_path / "out", **flags)) == 0
    AcceleratorState._reset_state(True)
    (folder,) = {path.parent for path in (tmp_path / "logs").rglob("events*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    for name in ("average", "divergence", "training", "average_base"):
        tag = f"loss/validation/epoch_{name}"
        assert [event.step for event in events.Scalars(tag)] == [1, 2]
