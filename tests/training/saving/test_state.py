"""A state folder holds what the mapping of a run names, under accelerate's file names, and gives it back exactly."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import safe_open
from torch import nn

from library.checkpoints.header import CheckpointError, NotFiniteError
from library.options.mistakes import UserError
from library.training.optim.optimizers import ExactState
from library.training.saving.checksums import STATE_FILE
from library.training.saving.state import Progress, RandomStates, RunState, load_state, read_state
from tests.training.saving.states import save

PROGRESS = Progress(step=5, epoch=2, window=1, epoch_losses=[0.5], last_epoch_losses=[0.25])


class Count:
    """Something that a later feature adds."""

    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def a_run(seed: int) -> RunState:
    """Two trained modules with an optimizer that has stepped, its schedule, no gradient scaler."""
    torch.manual_seed(seed)
    unet, encoder = nn.Linear(3, 2), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([*unet.parameters(), *encoder.parameters()])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    encoder(unet(torch.ones(1, 3))).sum().backward()
    optimizer.step()
    schedule.step()
    return {
        "unet": unet, "text_encoder1": encoder, "optimizer": ExactState(optimizer), "schedule": schedule,
        "scaler": None, "random": RandomStates(), "count": Count(seed),
    }  # fmt: skip


def test_files_have_the_names_of_accelerate(tmp_path: Path) -> None:
    save(tmp_path / "state", PROGRESS, a_run(1))
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [
        "count.bin", "model.safetensors", "model_1.safetensors", "optimizer.bin", "random_states_0.pkl",
        "scheduler.bin", "train_state.json",
    ]  # fmt: skip
    for name, part in (("model", "unet"), ("model_1", "text_encoder1")):
        with safe_open(tmp_path / "state" / f"{name}.safetensors", "pt") as file:
            assert file.metadata()["part"] == part


def test_every_entry_is_restored(tmp_path: Path) -> None:
    saved = a_run(1)
    save(tmp_path / "state", PROGRESS, saved)
    drawn = random.random(), numpy.random.rand(), torch.rand(3).tolist()
    other = a_run(2)
    assert load_state(read_state(tmp_path / "state"), other) == PROGRESS
    assert (random.random(), numpy.random.rand(), torch.rand(3).tolist()) == drawn
    for name in ("unet", "text_encoder1"):
        one, two = saved[name].state_dict(), other[name].state_dict()
        assert all(torch.equal(one[key], two[key]) for key in one)
    moments = [run["optimizer"].state_dict()["state"][0]["exp_avg"] for run in (saved, other)]
    assert torch.equal(*moments) and moments[0].any()
    assert other["schedule"].state_dict() == saved["schedule"].state_dict()
    assert other["count"].state_dict() == {"value": 1}


def test_a_state_that_lacks_an_entry_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "state", PROGRESS, {**a_run(1), "count": None})
    with pytest.raises(UserError, match="count.bin"):
        load_state(read_state(tmp_path / "state"), a_run(2))


def test_no_partial_state_is_left(tmp_path: Path) -> None:
    save(tmp_path / "state", PROGRESS, a_run(1))
    with pytest.raises(CheckpointError, match="count.bin: could not be written .disk full"):
        save(tmp_path / "state", PROGRESS, {**a_run(2), "count": Full(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    kept = a_run(3)
    load_state(read_state(tmp_path / "state"), kept)
    assert kept["count"].state_dict() == {"value": 1}


def test_a_state_with_a_nan_is_not_written(tmp_path: Path) -> None:
    """In the weights as in what the optimizer remembers."""
    for name in ("unet", "optimizer"):
        run = a_run(1)
        with torch.no_grad():
            first = next(iter(run["unet"].parameters()))  # type: ignore[union-attr]
            spoiled = first if name == "unet" else run["optimizer"].state_dict()["state"][0]["exp_avg"]  # type: ignore[union-attr]
            spoiled.view(-1)[0] = torch.nan
        with pytest.raises(
            NotFiniteError, match=r"state.(model.safetensors|optimizer.bin): not written, because .* contains NaN"
        ):
            save(tmp_path / "state", PROGRESS, run)
        assert not list(tmp_path.iterdir())


class Full(Count):
    """The disk is full when it is written."""

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        return {"value": Full(0)}

    def __reduce__(self) -> str:
        raise OSError("disk full")


@pytest.mark.parametrize(
    "change",
    [
        {"step": "3"}, {"step": -1}, {"step": 2**60}, {"epoch": 1.5}, {"window": None}, {"epoch_losses": ["a"]},
        {"standings": {"loss": 3}}, {"base_losses": []}, {"began": "../../x"}, {"began": 7}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_head_that_no_run_has_written_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    """A state may be downloaded (--resume_from_huggingface). `began` becomes part of names of files."""
    (tmp_path / STATE_FILE).write_text(
        json.dumps({"progress": {"step": 1, **change}, "identity": {}}), encoding="utf-8"
    )
    with pytest.raises(UserError, match="not a training state of this trainer"):
        read_state(tmp_path)


def test_a_file_of_a_state_that_would_unpack_to_gigabytes_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(4_000_000)}, tmp_path / "scheduler.bin")
    with zipfile.ZipFile(tmp_path / "scheduler.bin") as stored:
        entries = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(tmp_path / "scheduler.bin", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in entries.items():
            packed.writestr(name, content)
    (tmp_path / STATE_FILE).write_text(json.dumps({"progress": {"step": 1}, "identity": {}}), encoding="utf-8")
    schedule = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1))
    with pytest.raises(UserError, match="would unpack to 16"):
        load_state(read_state(tmp_path), {"schedule": schedule})
