"""Whole runs: fused is unfused, rounded weights resume, and nothing that is not finite is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from library.training.training_loss import TrainingLoss
from tests.training.running import World, assert_equal_files, make_world, run

FLAGS: dict[str, Any] = {
    "train_batch_size": 3, "max_train_steps": 4, "stop_text_encoder_training": 3, "learning_rate_te": 1e-4,
    "gradient_checkpointing": True, "lr_scheduler": "cosine", "use_ema": True, "max_grad_norm": 0.05,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def test_fused_is_unfused_and_either_resumes_the_other(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text encoder with a rate of its own that stops, a schedule, clipping, EMA, checkpointing."""
    monkeypatch.setattr("library.training.update.fused.AT_ONCE", 50_000)  # the miniature has some hundred thousand
    saving = {"save_every_n_steps": 2, "save_state": True}
    whole = run(world.arguments(tmp_path / "whole", **FLAGS, **saving), capsys)
    assert whole.code == 0 and len(whole.losses) == 4, whole.err
    fused = run(world.arguments(tmp_path / "fused", **FLAGS, **saving, fused_backward_pass=True), capsys)
    assert fused.code == 0, fused.err
    assert fused.losses == whole.losses
    state = "dog-step00000002-state"
    resumed = {"resume": tmp_path / "whole" / state, "fused_optimizer_groups": 5}
    groups = run(world.arguments(tmp_path / "groups", **FLAGS, **resumed), capsys)
    again = run(world.arguments(tmp_path / "again", **FLAGS, resume=tmp_path / "fused" / state), capsys)
    assert groups.code == 0 and again.code == 0, groups.err + again.err
    for name in ("dog.safetensors", "dog_ema.safetensors"):
        for folder in ("fused", "groups", "again"):
            assert_equal_files(tmp_path / "whole" / name, tmp_path / folder / name)


def test_a_gradient_that_is_not_finite(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the third step, whose loss is finite. With one pass, weights may have changed by then: the run ends, the state
    before is the last, and no file has a NaN. With two, the step is skipped as in any run."""
    compute = TrainingLoss.__call__

    def spoiled(self: TrainingLoss, batch: Any, step: int) -> Any:
        terms = compute(self, batch, step)
        if step == 2:
            for term in terms:
                term.losses.register_hook(lambda gradient: gradient * torch.inf)
        return terms

    monkeypatch.setattr(TrainingLoss, "__call__", spoiled)
    flags = {"train_batch_size": 3, "max_train_steps": 4, "max_grad_norm": 0, "fused_backward_pass": True}
    saving = {"save_every_n_steps": 2, "save_state": True}
    one = run(world.arguments(tmp_path / "one", **flags, **saving), capsys)
    assert one.code != 0 and "the gradient is not finite at step 3" in one.err and "Traceback" not in one.err
    assert "cut off in its middle" in one.err
    assert sorted(path.name for path in (tmp_path / "one").glob("*.safetensors")) == ["dog-step00000002.safetensors"]
    outcomes = {
        name: run(world.arguments(tmp_path / name, **{**flags, "max_nonfinite_steps": 1, **more}), capsys)
        for name, more in (("two", {}), ("unfused", {"fused_backward_pass": False}))
    }
    assert all(outcome.code == 0 for outcome in outcomes.values()), outcomes["two"].err
    assert outcomes["two"].losses == outcomes["unfused"].losses
    assert_equal_files(tmp_path / "two" / "dog.safetensors", tmp_path / "unfused" / "dog.safetensors")
