"""A save that fails stops no training, removes no good file, and comes to a good end later or elsewhere."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.checkpoints.writer import write_safetensors, write_text
from library.options.groups.saving import SavingOptions
from library.options.mistakes import Mistakes, UserError
from library.training.saving import unsaved
from library.training.saving.outputs import decide_outputs
from library.training.saving.saver import Saver
from library.training.saving.state import STATE_FILE, Progress
from library.training.saving.unsaved import AGAIN_AFTER, APART, PATIENCE, Unsaved, explain_write_errors
from library.whole_files import replacing_folder


class World:
    """A saver whose disk fails on demand, and whose clock goes on only when it waits."""

    def __init__(self, folder: Path, value: float = 1.0, **options: Any) -> None:
        chosen = SavingOptions(output_dir=folder, output_name="dog", save_model_as="safetensors", **options)
        outputs = decide_outputs(chosen, "safetensors", 9, Mistakes())
        self.folder, self.value, self.time = folder, value, 0.0
        self.fails: Callable[[Path], bool] = lambda path: False
        self.warned: list[str] = []
        self.writing: tuple[Path, Callable[[], None], Callable[[], None]] | None = None
        self.at_once = True  # a state is written before the next step ends
        weights: Any = SimpleNamespace(holding=lambda suffix: nullcontext(), metadata=lambda suffix: {})
        self.saver = Saver(
            outputs, 9, self.write, self, lambda text: None, weights, warn=self.warned.append,
            clock=lambda: self.time, sleep=self.sleep,
        )  # fmt: skip

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def write(self, path: Path, save_as: str, at: Any) -> None:
        self.check(path)
        write_safetensors(path, {"weight": torch.tensor([self.value])}, {"step": str(at.step)})

    def begin(self, folder: Path, progress: Progress, done: Callable[[], None]) -> None:
        """Write a state, as state_writer.StateWriter does: what goes wrong is raised by `collect`."""

        def write() -> None:
            self.check(folder)
            with replacing_folder(folder) as building:
                write_text(building / STATE_FILE, str(progress.step))

        self.writing = folder, write, done

    def collect(self, *, wait: bool = False) -> None:
        if self.writing is None or not (wait or self.at_once):
            return
        (folder, write, done), self.writing = self.writing, None
        with explain_write_errors(folder):
            write()
        done()

    def check(self, path: Path) -> None:
        if self.fails(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def after(self, step: int) -> None:
        self.saver.save_due(Progress(step=step), epoch_ended=False)

    def files(self) -> list[str]:
        return sorted(os.listdir(self.folder)) if self.folder.exists() else []


def stem(*steps: int, state: bool = True) -> list[str]:
    names = [f"dog-step{step:08d}" for step in steps]
    return sorted([f"{name}.safetensors" for name in names] + [f"{name}-state" for name in names if state])


def test_a_save_that_fails_is_tried_again_and_costs_no_good_file(tmp_path: Path) -> None:
    world = World(tmp_path / "out", save_every_n_steps=10, save_last_n_steps=10, save_state=True)
    world.after(10)
    world.after(20)
    assert world.files() == stem(10, 20)
    world.fails = lambda path: path.name.endswith("-state")
    world.after(30)  # it would remove step 10
    assert world.files() == sorted([*stem(20), "dog-step00000010-state", "dog-step00000030.safetensors"])
    assert len(world.warned) == 1 and "NOT SAVED" in world.warned[0] and "No space left" in world.warned[0]
    assert str(tmp_path / "out" / "dog-step00000020-state") in world.warned[0]
    world.after(31)  # too early
    world.time += AGAIN_AFTER
    world.after(32)  # still full
    assert len(world.warned) == 2 and not set(stem(32)) & set(world.files())
    world.time += AGAIN_AFTER
    world.fails = lambda path: False
    world.after(33)
    assert {*stem(20, 33), "dog-step00000010-state"} <= set(world.files())
    world.after(34)
    assert not set(stem(34)) & set(world.files())
    world.after(40)
    world.after(50)
    assert world.files() == stem(40, 50)
    assert len(world.warned) == 2


def test_old_files_go_only_in_exchange_for_new_ones(tmp_path: Path) -> None:
    """As many stay as the user wants to keep, although one was missed."""
    world = World(tmp_path / "out", save_every_n_steps=10, save_last_n_steps=10)
    world.after(10)
    world.after(20)
    world.fails = lambda path: True
    world.after(30)
    world.fails = lambda path: False
    world.after(40)
    assert world.files() == stem(20, 40, state=False)
    world.after(50)
    assert world.files() == stem(40, 50, state=False)


def test_the_last_model_waits_elsewhere_for_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsaved, "other_folders", lambda *_: iter([tmp_path / "bad", tmp_path / "rescued"]))
    monkeypatch.setattr("library.training.saving.saver.other_folders", unsaved.other_folders)
    world = World(tmp_path / "out", save_state_on_train_end=True)
    at: list[float] = []

    def fails(path: Path) -> bool:
        at.append(world.time)
        if tmp_path / "rescued" in path.parents:
            return False
        if world.time > 0:  # while it waits, it lies elsewhere
            assert (tmp_path / "rescued" / "dog.safetensors").exists()
        return world.time < 3 * APART

    world.fails = fails
    world.saver.finish(Progress(step=5))
    assert world.files() == ["dog-state", "dog.safetensors"] and os.listdir(tmp_path) == ["out"]
    assert max(at) == 3 * APART
    assert world.saver.written == [tmp_path / "out" / name for name in ("dog.safetensors", "dog-state")]


def test_the_last_model_stays_elsewhere_and_the_run_ends_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    world = World(tmp_path / "drive" / "out", save_state=True)
    world.fails = lambda path: tmp_path / "drive" in path.parents
    with pytest.raises(Unsaved, match="the final model is in .*dog-rescued-") as ended:
        world.saver.finish(Progress(step=5))
    assert world.time == pytest.approx(PATIENCE)
    (rescued,) = tmp_path.glob("dog-rescued-*")
    assert str(rescued) in str(ended.value) and sorted(os.listdir(rescued)) == ["dog-state", "dog.safetensors"]
    assert world.files() == []
    world.fails = lambda path: True
    with pytest.raises(Unsaved, match="No space left"):
        world.saver.finish(Progress(step=5))
    # a state that is saved in an emergency goes elsewhere at once
    world.fails = lambda path: tmp_path / "drive" in path.parents
    before = world.time
    folder = world.saver.save_now(Progress(step=7))
    assert folder.name == "dog-step00000007-state" and folder.exists() and world.time == before


def test_values_that_are_not_finite_end_the_run_at_once(tmp_path: Path) -> None:
    world = World(tmp_path / "out", value=float("nan"), save_every_n_steps=10)
    for save in (lambda: world.after(10), lambda: world.saver.finish(Progress(step=11))):
        with pytest.raises(UserError, match="contains NaN") as ended:
            save()
        assert not isinstance(ended.value, Unsaved)
    assert world.files() == [] and world.warned == [] and world.time == 0


def test_a_disk_without_room_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path / "out", save_every_n_steps=10)
    world.after(10)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=50))
    world.fails = lambda path: pytest.fail("it was tried")
    world.after(20)
    assert "was not written: it needs 0.1 kB, the disk has" in world.warned[0] and world.files() == stem(
        10, state=False
    )
