"""Whole runs that keep their best checkpoint and end early. What is measured is written in the test."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train_network
from library.checkpoints.files import read_header
from library.training.validation.losses import Losses
from library.training.validation.plan import TIMESTEPS
from library.training.validation.validation import Validation
from library.whole_files import is_temporary
from tests.training.running import World, assert_equal_files, make_world, run

FLAGS: dict[str, object] = {
    "network_module": "networks.lora", "network_dim": 2, "network_train_unet_only": True, "validation_split": 0.34,
    "max_train_steps": 6, "validate_every_n_steps": 1, "keep_best": "validation_loss",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Lets the next runs measure these validation losses, first of all that of the base model."""

    def script(values: list[float]) -> None:
        left = iter(values)

        def measure(self: Validation, *given: Any) -> Losses:
            losses = torch.full((1, TIMESTEPS), next(left), dtype=torch.float64)
            return Losses(losses, losses)

        monkeypatch.setattr(Validation, "measure", measure)

    return script


def test_the_best_is_kept_and_the_run_ends_early(
    world: World, tmp_path: Path, measuring: Callable[[list[float]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """At the end there are the last model and its state, from which only more patience goes on. Uninterrupted, such a
    run ends with the same files."""
    measuring([9, 5, 3, 4, 3.5])
    early = {"early_stop": "validation_loss:2", "save_state_on_train_end": True}
    outcome = run(world.arguments(tmp_path / "early", **FLAGS, **early), capsys, train_network.RECIPE)
    assert outcome.code == 0, outcome.err
    assert "ends early once validation_loss has not become better in 2 measurements" in outcome.out
    assert "the best by validation_loss (smaller is better): dog_best.safetensors" in outcome.out
    assert "stopped early after step 4 of 6: validation_loss has not become better in 2 measurements" in outcome.err
    assert "validation_loss was best after step 2, 3: " in outcome.err
    kept = tmp_path / "early" / "dog_best.safetensors"
    metadata = read_header(kept).metadata
    assert [metadata[f"ss_best_{name}"] for name in ("metric", "value", "step")] == ["validation_loss", "3.0", "2"]
    assert metadata["ss_steps"] == "2"
    assert read_header(tmp_path / "early" / "dog.safetensors").metadata["ss_steps"] == "4"

    state = {"resume": tmp_path / "early" / "dog-state"}
    again = run(world.arguments(tmp_path / "early", **FLAGS, **early, **state), capsys, train_network.RECIPE)
    assert again.code == 2 and "raise the patience of --early_stop to go on" in again.err

    measuring([3.2, 2.5])
    more = run(
        world.arguments(tmp_path / "early", **FLAGS, **state, early_stop="validation_loss:5"),
        capsys,
        train_network.RECIPE,
    )
    assert more.code == 0, more.err
    measuring([9, 5, 3, 4, 3.5, 3.2, 2.5])
    whole = run(world.arguments(tmp_path / "whole", **FLAGS), capsys, train_network.RECIPE)
    assert whole.code == 0, whole.err
    for name in ("dog.safetensors", "dog_best.safetensors"):
        assert_equal_files(tmp_path / "early" / name, tmp_path / "whole" / name)
    assert read_header(kept).metadata["ss_best_step"] == "6"
    table = (tmp_path / "whole" / "dog-validation.csv").read_bytes()
    assert (tmp_path / "early" / "dog-validation.csv").read_bytes() == table
    assert table.count(b"\n") == 1 + 7 * 2 * 9


def test_a_run_may_end_between_epochs(
    world: World, tmp_path: Path, measuring: Callable[[list[float]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two epochs of six steps, of which the second is the worse: the third does not begin, and goes on from its
    state."""
    measuring([9, 5, 6])
    flags = {**FLAGS, "validate_every_n_steps": None, "max_train_steps": 14, "early_stop": "validation_loss:1"}
    ending = {"save_state_on_train_end": True}
    outcome = run(world.arguments(tmp_path / "out", **flags, **ending), capsys, train_network.RECIPE)
    assert outcome.code == 0, outcome.err
    assert "stopped early after step 12 of 14" in outcome.err and "epoch 3/" not in outcome.err
    measuring([4])
    more = {**flags, "early_stop": None, "resume": tmp_path / "out" / "dog-state"}
    rest = run(world.arguments(tmp_path / "rest", **more), capsys, train_network.RECIPE)
    assert rest.code == 0, rest.err
    assert "the best validation_loss so far, 5 after step 6, is not in" in rest.err
    assert read_header(tmp_path / "rest" / "dog_best.safetensors").metadata["ss_best_step"] == "14"


def test_the_best_that_is_there_stays_until_the_new_one_is_whole(
    world: World,
    tmp_path: Path,
    measuring: Callable[[list[float]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The disk is full from the second one on, which the run survives."""
    measuring([9, 5, 3, *[4] * 9])
    replacing, count = os.replace, []

    def full(source: Any, target: Any) -> None:
        if str(target).endswith("dog_best.safetensors"):
            count.append(target)
            if len(count) >= 2:
                raise OSError(28, "No space left on device")
        replacing(source, target)

    monkeypatch.setattr(os, "replace", full)
    outcome = run(world.arguments(tmp_path, **FLAGS), capsys, train_network.RECIPE)
    assert outcome.code == 0 and "the best model so far was NOT SAVED" in outcome.err
    assert "older files were kept, no partial file was left" in outcome.err
    assert read_header(tmp_path / "dog_best.safetensors").metadata["ss_best_step"] == "1"
    assert not [path for path in tmp_path.iterdir() if is_temporary(path)]


def test_a_metric_that_is_never_measured_ends_the_plan(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {**FLAGS, "validation_split": 0, "early_stop": "class_loss:2", "dry_run": True}
    outcome = run(world.arguments(tmp_path, **flags), capsys, train_network.RECIPE)
    assert outcome.code == 2
    assert "--keep_best validation_loss" in outcome.err and "--early_stop class_loss:2" in outcome.err
