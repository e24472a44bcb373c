"""Losses that are not finite during a real run: skipped steps, resumed exactly, and what remains of a run they stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.training.training_loss import TrainingLoss
from tests.training.running import Outcome, World, assert_equal_files, make_world, run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make the output of the model NaN in the forward passes of these steps, counted from 1."""
    compute, predict, now = TrainingLoss.__call__, TrainingLoss.predict, [0]

    def computing(self: TrainingLoss, batch: Any, step: int) -> Any:
        now[0] = step + 1
        return compute(self, batch, step)

    def predicting(self: TrainingLoss, inputs: Any) -> torch.Tensor:
        return predict(self, inputs) * (torch.nan if now[0] in steps else 1)

    monkeypatch.setattr(TrainingLoss, "__call__", computing)
    monkeypatch.setattr(TrainingLoss, "predict", predicting)


def go(world: World, out: Path, capsys: pytest.CaptureFixture[str], **more: object) -> Outcome:
    flags = {
        "max_train_steps": 4, "lr_scheduler": "linear", "use_ema": True, "save_every_n_steps": 1, "save_state": True,
        **more,
    }  # fmt: skip
    outcome = run(world.arguments(out, **flags), capsys)
    assert "Traceback" not in outcome.err, outcome.err
    return outcome


def recorded(out: Path) -> list[tuple[int, float]]:
    """Steps with their losses, as the record of a run has them."""
    events = [json.loads(line) for line in (out / "dog-run.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(event["step"], event["data"]["loss"]) for event in events if "loss" in event["data"]]


def test_a_run_with_skipped_steps_resumes_exactly_and_one_too_many_ends_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, 2, 3)
    whole = go(world, tmp_path / "whole", capsys, max_nonfinite_steps=2)
    assert whole.code == 0 and sorted(whole.losses) == [1, 4], whole.err
    assert "the loss is not finite at step 2 (epoch 1): " in whole.err and ", timestep " in whole.err
    assert "skipped, as loss or gradient was not finite: 2 steps" in whole.err
    state = tmp_path / "whole" / "dog-step00000002-state"  # within the row of skipped steps
    resumed = go(world, tmp_path / "resumed", capsys, max_nonfinite_steps=2, resume=state, save_every_n_steps=None)
    assert resumed.code == 0 and resumed.losses == {4: whole.losses[4]}
    for name in ("dog.safetensors", "dog_ema.safetensors"):
        assert_equal_files(tmp_path / "whole" / name, tmp_path / "resumed" / name)

    # read together: to the letter the same
    late = go(world, tmp_path / "late", capsys, max_nonfinite_steps=2, loss_read_interval=3, save_every_n_steps=None)
    assert late.code == 0 and late.losses == whole.losses
    assert [line[20:] for line in late.err.splitlines() if "not finite" in line] == [
        line[20:] for line in whole.err.splitlines() if "not finite" in line
    ]
    assert recorded(tmp_path / "late") == recorded(tmp_path / "whole") == [*sorted(whole.losses.items())]
    for name in ("dog.safetensors", "dog_ema.safetensors"):
        assert_equal_files(tmp_path / "whole" / name, tmp_path / "late" / name)

    # one too many, counted across the resume: the row began in the run before
    stopped = go(world, tmp_path / "stopped", capsys, max_nonfinite_steps=1, resume=state, save_every_n_steps=None)
    assert stopped.code == 2 and "at step 3" in stopped.err and "as in the 1 step before" in stopped.err
    at_once = go(world, tmp_path / "at_once", capsys, save_every_n_steps=None)
    assert at_once.code == 2 and "at step 2" in at_once.err
    assert "model and state are saved as of step 1" in at_once.err
    (saved,) = (tmp_path / "at_once").glob("dog-step00000001.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(saved).values() if tensor.is_floating_point())
    assert not (tmp_path / "at_once" / "dog.safetensors").exists()
