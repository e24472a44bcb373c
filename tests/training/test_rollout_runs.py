"""Whole runs with scheduled sampling: what stays bit for bit, validation, batches, and what the plan says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train_network
from library.data.batch import Batch
from library.training.preservation.base import Base
from library.training.training_loss import Inputs, TrainingLoss
from tests.training.running import World, assert_equal_files, make_world, run

Output = pytest.CaptureFixture[str]
LORA = {"network_module": "networks.lora", "network_dim": 2, "network_dropout": 0.5, "network_train_unet_only": True}
ROLLOUT = {
    "scheduled_sampling_max_step_offset": 2,
    "scheduled_sampling_probability": 1.0,
    "scheduled_sampling_stride": "inference",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def test_a_run_is_the_same_up_to_the_first_rolled_sample(world: World, tmp_path: Path, capsys: Output) -> None:
    """Also with dropout, whose draws come from the global random state; and without a share to the end."""
    flags = {**LORA, "max_train_steps": 4, "train_batch_size": 3}
    plain = run(world.arguments(tmp_path / "plain", **flags), capsys, train_network.RECIPE)
    assert plain.code == 0, plain.err
    later = {**flags, **ROLLOUT, "scheduled_sampling_start_step": 2}
    rolled = run(world.arguments(tmp_path / "rolled", **later), capsys, train_network.RECIPE)
    assert rolled.code == 0, rolled.err
    assert [rolled.losses[step] == plain.losses[step] for step in (1, 2, 3)] == [True, True, False]
    never = run(
        world.arguments(tmp_path / "never", **{**flags, **ROLLOUT, "scheduled_sampling_probability": 0.0}),
        capsys,
        train_network.RECIPE,
    )
    assert never.losses == plain.losses and "no sample is rolled" in never.out
    assert_equal_files(tmp_path / "plain" / "dog.safetensors", tmp_path / "never" / "dog.safetensors")


def test_a_step_is_the_same_in_one_batch_or_in_two(world: World, tmp_path: Path, capsys: Output) -> None:
    """The loss of the same eight samples, up to rounding."""
    flags = {"max_train_steps": 1, "min_snr_gamma": 5}
    plain = run(world.arguments(tmp_path / "plain", **flags, train_batch_size=8), capsys)
    flags |= {**ROLLOUT, "scheduled_sampling_sampler": "dpm"}
    one = run(world.arguments(tmp_path / "one", **flags, train_batch_size=8), capsys)
    two = run(world.arguments(tmp_path / "two", **flags, train_batch_size=4, gradient_accumulation_steps=2), capsys)
    assert one.code == 0 and two.code == 0, one.err + two.err
    assert one.losses[1] == pytest.approx(two.losses[1], rel=1e-3)
    assert one.losses[1] != pytest.approx(plain.losses[1], rel=1e-2)


def test_validation_is_never_rolled(world: World, tmp_path: Path, capsys: Output) -> None:
    """With a learning rate that changes no weight, its losses are those of a run without rollout."""
    flags = {"learning_rate": 1e-30, "max_train_steps": 1, "validation_split": 0.4, "validate_every_n_steps": 1}
    found = []
    for name, more in (("plain", {}), ("rolled", ROLLOUT)):
        outcome = run(world.arguments(tmp_path / name, **flags, **more), capsys)
        assert outcome.code == 0, outcome.err
        found.append([line.partition("validation loss")[2] for line in outcome.err.splitlines()])
    assert any(found[0]) and found[0] == found[1]


def test_the_base_model_of_an_anchor_gets_what_arrived(
    world: World, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows, bit for bit, and the rollout runs once, with the adapter as it is."""
    passes: list[tuple[str, Tensor]] = []
    predict, base = TrainingLoss.predict, Base.__call__

    def recorded(self: TrainingLoss, inputs: Inputs) -> Tensor:
        passes.append(("training" if torch.is_grad_enabled() else "rollout", inputs.noisy))
        return predict(self, inputs)

    def base_recorded(self: Base, batch: Batch, inputs: Inputs, captions: Sequence[str], rows: Sequence[int]) -> Tensor:
        passes.append(("base", inputs.rows(rows).noisy))
        return base(self, batch, inputs, captions, rows)

    monkeypatch.setattr(TrainingLoss, "predict", recorded)
    monkeypatch.setattr(Base, "__call__", base_recorded)
    flags = {**LORA, **ROLLOUT, "scheduled_sampling_max_step_offset": 1, "reg_data_dir": world.root / "reg"}
    words = world.arguments(tmp_path, **flags, max_train_steps=1, train_batch_size=6, preservation="base_prediction")
    outcome = run(words, capsys, train_network.RECIPE)
    assert outcome.code == 0, outcome.err
    assert [name for name, _ in passes] == ["rollout", "base", "training"]
    rows = [any(torch.equal(row, other) for other in passes[2][1]) for row in passes[1][1]]
    assert rows and all(rows)


def test_the_plan_says_what_it_costs_and_what_has_no_effect(world: World, tmp_path: Path, capsys: Output) -> None:
    """The settings of SimpleTuner's guide: all samples after 1000 steps, 5.5 passes for each of them."""
    guide = {"scheduled_sampling_max_step_offset": 10, "scheduled_sampling_probability": 1.0}
    flags = {**guide, "scheduled_sampling_ramp_steps": 1000, "scheduled_sampling_sampler": "unipc", "dry_run": True}
    text = run(world.arguments(tmp_path, **flags, max_train_steps=1000), capsys).out
    assert "rollout of 0% to 100% (linear from step 0 to 1000) of the samples over 1 to 10 steps of 1 timestep" in text
    assert "adds about 2.7 forward passes per sample (10 for the longest rollout), 92% of the training time" in text
    many = run(world.arguments(tmp_path, dry_run=True, **guide, scheduled_sampling_stride="inference"), capsys).out
    assert "1 to 3 are enough" in many
    short = run(world.arguments(tmp_path, dry_run=True, **ROLLOUT, max_timestep=30), capsys)
    assert short.code == 2 and "a step of a rollout is 36 timesteps, but only 0 to 29 are trained" in short.err
    later = run(world.arguments(tmp_path, dry_run=True, **ROLLOUT, scheduled_sampling_start_step=5000), capsys).out
    assert "_start_step 5000: step 5001 is never reached" in later and "no sample is rolled" in later


def test_the_guides_other_keys_are_answered(world: World, tmp_path: Path, capsys: Output) -> None:
    """Order 2 is what the samplers have; ReflexFlow is for flow matching."""
    same = {"scheduled_sampling_order": 2, "scheduled_sampling_reflexflow": "false", "dry_run": True}
    assert run(world.arguments(tmp_path, **ROLLOUT, **same), capsys).code == 0
    other = run(world.arguments(tmp_path, **ROLLOUT, scheduled_sampling_order=3, dry_run=True), capsys)
    assert other.code == 2 and "--scheduled_sampling_order = 3" in other.err
    reflex = run(world.arguments(tmp_path, **ROLLOUT, scheduled_sampling_reflexflow=True, dry_run=True), capsys)
    assert reflex.code == 2 and "--scheduled_sampling_reflexflow" in reflex.err
