"""States are written beside the training: as it was when the save began, one after the other, errors told later."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from library.checkpoints.header import CheckpointError
from library.options.mistakes import UserError
from library.training.saving import state_writer
from library.training.saving.state import Description, Progress, RunState, load_state, read_state
from library.training.saving.state_writer import StateWriter
from library.training.saving.unsaved import Unsaved
from tests.training.saving.test_state import a_run

PLENTY = 2**40


class Held:
    """Holds the thread that writes, until `release` is called; or lets it fail."""

    def __init__(self, patch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.released = threading.Event()
        original = state_writer.write_state

        def held(*given: object) -> None:
            check: Callable[[], None] = given[3]  # type: ignore[assignment]
            while not self.released.wait(0.005):
                check()
            if error is not None:
                raise error
            original(*given)  # type: ignore[arg-type]

        patch.setattr(state_writer, "write_state", held)

    def release(self) -> None:
        self.released.set()


def writer(state: RunState, said: list[str], free: int = PLENTY) -> StateWriter:
    return StateWriter(state, Description({"seed": "1"}), said.append, lambda: free)


def test_a_state_is_that_of_the_beginning_of_its_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on meanwhile, and changes weights and optimizer in place."""
    state, held, done = a_run(1), Held(monkeypatch), []
    before = {name: tensor.clone() for name, tensor in state["unet"].state_dict().items()}  # type: ignore[union-attr]
    states, progress = writer(state, []), Progress(step=5, epoch_losses=[1.0])
    with states.writing():
        states.begin(tmp_path / "a-state", progress, lambda: done.append("a"))
        states.collect()
        assert not done and not (tmp_path / "a-state").exists()
        with torch.no_grad():
            for tensor in state["unet"].state_dict().values():  # type: ignore[union-attr]
                tensor.mul_(2)
        progress.epoch_losses.append(2.0)
        held.release()
    assert done == ["a"]
    other = a_run(2)
    assert load_state(read_state(tmp_path / "a-state"), other) == Progress(step=5, epoch_losses=[1.0])
    loaded = other["unet"].state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in before.items())


def test_an_error_of_the_thread_reaches_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, CheckpointError("the disk is full"))
    states, done = writer(a_run(1), []), []
    held.release()
    states.begin(tmp_path / "a-state", Progress(), lambda: done.append("a"))
    with pytest.raises(Unsaved, match="the disk is full"):
        states.collect(wait=True)
    states.collect(wait=True)
    assert not done and not list(tmp_path.iterdir())


def test_a_run_that_ends_at_once_leaves_nothing_of_a_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Held(monkeypatch)
    states, done = writer(a_run(1), []), []
    with pytest.raises(KeyboardInterrupt), states.writing():
        states.begin(tmp_path / "a-state", Progress(), lambda: done.append("a"))
        raise KeyboardInterrupt
    assert not done and not list(tmp_path.iterdir())


def test_a_run_that_an_error_ends_waits_for_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, done = Held(monkeypatch), []
    states = writer(a_run(1), [])
    with pytest.raises(UserError), states.writing():
        states.begin(tmp_path / "a-state", Progress(), lambda: done.append("a"))
        threading.Timer(0.05, held.release).start()
        raise UserError([])
    assert done == ["a"] and (tmp_path / "a-state" / "train_state.json").is_file()


def test_without_room_for_a_copy_the_training_waits(tmp_path: Path) -> None:
    said: list[str] = []
    states = writer(a_run(1), said, free=100)
    for name in ("a", "b"):
        states.begin(tmp_path / f"{name}-state", Progress(), lambda: None)
        assert (tmp_path / f"{name}-state" / "train_state.json").is_file()
        states.collect()
    assert len(said) == 1 and "the training waits while a state is written" in said[0]


def test_an_interrupt_before_the_thread_begins_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    states, done = writer(a_run(1), []), list[str]()
    with pytest.raises(KeyboardInterrupt), states.writing():
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        states.begin(tmp_path / "a-state", Progress(step=1), lambda: done.append("a"))
    assert not done and not list(tmp_path.iterdir())


def test_a_state_that_is_complete_when_a_run_is_interrupted_counts(tmp_path: Path) -> None:
    states, done = writer(a_run(1), [], free=0), list[str]()  # without room for a copy, `begin` waits
    with pytest.raises(KeyboardInterrupt), states.writing():
        states.begin(tmp_path / "a-state", Progress(step=1), lambda: done.append("a"))
        raise KeyboardInterrupt
    assert done == ["a"] and read_state(tmp_path / "a-state").progress.step == 1
