"""Any damage of a state is found, and the newest whole one of a run is that with the most steps."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from library.training.saving.state import Progress, read_state
from library.training.saving.whole_states import damage, newest_whole
from tests.training.saving.states import save
from tests.training.saving.test_state import a_run


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of the weights": (lambda folder: flip(folder / "model.safetensors"), "content of model.safetensors"),
    "a bit of the optimizer": (lambda folder: flip(folder / "optimizer.bin"), "content of optimizer.bin"),
    "cut off": (lambda folder: os.truncate(folder / "optimizer.bin", 100), "optimizer.bin has 100 of"),
    "a file is gone": (lambda folder: (folder / "random_states_0.pkl").unlink(), "random_states_0.pkl is missing"),
    "another step": (
        lambda folder: (folder / "train_state.json").write_text(
            (folder / "train_state.json").read_text("utf-8").replace('"step": 7', '"step": 8'), "utf-8"
        ),
        "train_state.json was changed",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_the_state_before_is_taken(name: str, tmp_path: Path) -> None:
    do, told = DAMAGES[name]
    before, last = (tmp_path / f"dog-step0000000{step}-state" for step in (5, 7))
    state = a_run(1)
    save(before, Progress(step=5), state, output_name="dog")
    save(last, Progress(step=7), state, output_name="dog")
    assert damage(read_state(last)) == "" and newest_whole(tmp_path, "dog").state == read_state(last)
    do(last)
    assert told in damage(read_state(last))
    found = newest_whole(tmp_path, "dog")
    assert found.state is not None and found.state.folder == before
    assert any(str(last) in note and told in note for note in found.notes)


def test_what_cannot_be_read_at_all_is_said(tmp_path: Path) -> None:
    save(tmp_path / "dog-state", Progress(step=7), a_run(1), output_name="dog")
    os.truncate(tmp_path / "dog-state" / "train_state.json", 100)
    found = newest_whole(tmp_path, "dog")
    assert found.state is None and str(tmp_path / "dog-state") in found.notes[0]


def test_the_newest_is_that_with_the_most_steps(tmp_path: Path) -> None:
    """Whatever its name and the time of its files; at one step, the one that was written last."""
    state = a_run(1)
    for age, (name, step) in enumerate((("dog-000002", 8), ("dog-step00000010", 10), ("dog", 9), ("dog-000003", 10))):
        save(tmp_path / f"{name}-state", Progress(step=step), state, output_name="dog")
        times = (10.0**9 + (age if step == 10 else 10 + age),) * 2
        os.utime(tmp_path / f"{name}-state" / "train_state.json", times)
    found = newest_whole(tmp_path, "dog").state
    assert found is not None and found.folder.name == "dog-000003-state"


def test_states_of_other_runs_are_left_alone(tmp_path: Path) -> None:
    """Also those whose folder has a name of this run, but that say another."""
    state = a_run(1)
    for folder, name in (
        ("cat-state", "cat"),
        ("dog-2-state", "dog-2"),
        ("dog-000001-state", "dog-2"),
        ("last-state", ""),
    ):
        save(tmp_path / folder, Progress(step=5), state, output_name=name)
    assert newest_whole(tmp_path, "dog").state is None
    unnamed = newest_whole(tmp_path, None).state
    assert unnamed is not None and unnamed.folder.name == "last-state"
    assert newest_whole(tmp_path / "nowhere", "dog").state is None


def test_a_state_of_an_earlier_version_is_taken(tmp_path: Path) -> None:
    (tmp_path / "dog-state").mkdir()
    head = '{"progress": {"step": 3, "epoch": 1, "window": 3}, "identity": {}}'
    (tmp_path / "dog-state" / "train_state.json").write_text(head, encoding="utf-8")
    found = newest_whole(tmp_path, "dog").state
    assert found is not None and found.progress.step == 3
