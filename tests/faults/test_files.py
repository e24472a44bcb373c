"""Disks that fill up, folders that become read-only, processes killed while they write: what is there stays whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import train_db
import train_network
from library.training.run import Run
from library.training.saving import saver, unsaved
from library.training.saving.state_writer import StateWriter
from library.whole_files import is_temporary
from tests.small_disk import mounted
from tests.tools.filling import ROOT, kill_after
from tests.training.running import Outcome, World, assert_equal_files, make_world, run

FLAGS = {
    "network_module": "networks.lora",
    "max_train_steps": 5,
    "save_every_n_steps": 1,
    "save_last_n_steps": 1,
    "save_state": True,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """With room for a few models."""
    with mounted(tmp_path / "disk", "16m") as place:
        yield place


def at_steps(monkeypatch: pytest.MonkeyPatch, happens: dict[int, Callable[[Run], object]]) -> None:
    """Let something happen after an optimizer step, before what is due then."""
    log = Run.log

    def logging(self: Run, values: dict[str, float], step: int) -> None:
        if {"loss", "loss/current"} & values.keys() and (action := happens.pop(step, None)) is not None:
            action(self)
        log(self, values, step)

    monkeypatch.setattr(Run, "log", logging)


def fill(disk: Path) -> None:
    with open(disk / "filler", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while file.write(bytes(1 << 12)):
            pass


@contextmanager
def read_only(folder: Path) -> Iterator[Callable[[Run], object]]:
    """What makes a folder read-only, for the superuser too, until this context ends."""
    as_root = os.geteuid() == 0
    on, off = (["chattr", "+i"], ["chattr", "-i"]) if as_root else (["chmod", "555"], ["chmod", "755"])
    folder.mkdir(exist_ok=True)
    for words in (on, off):
        if shutil.which(on[0]) is None or subprocess.run([*words, folder], capture_output=True, check=False).returncode:
            pytest.skip("folders cannot be made read-only here")
    try:
        yield lambda run: subprocess.run([*on, folder], check=True)
    finally:
        subprocess.run([*off, folder], check=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def go(world: World, out: Path, capsys: pytest.CaptureFixture[str], **more: object) -> Outcome:
    outcome = run(world.arguments(out, **{**FLAGS, **more}), capsys, train_network.RECIPE)
    assert "Traceback" not in outcome.err, outcome.err
    return outcome


def test_a_disk_that_fills_or_becomes_read_only_costs_no_training(
    world: World, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # full during two saves, which TensorBoard does not survive: the training does
    out = disk / "out"

    def fill_and_log(run: Run) -> None:
        fill(disk)
        run.log({f"more/{number}": 0.0 for number in range(500)}, 2)

    at_steps(monkeypatch, {2: fill_and_log, 4: lambda run: (disk / "filler").unlink()})
    full = go(world, out, capsys, logging_dir=disk / "logs")
    assert full.code == 0, full.err
    assert full.err.count("NOT SAVED, the training goes on") == 2 and "No space left" in full.err
    assert "tensorboard failed and is no longer used" in full.err
    kept = {f"dog-step{step:08d}{ending}" for step in (4, 5) for ending in (".safetensors", "-state")}
    found = {name for name in names(out) if name.endswith((".safetensors", "-state"))}
    assert found == {*kept, "dog.safetensors", "dog-state"}
    assert not [path for path in disk.rglob("*") if is_temporary(path)]

    # read-only until the end and beyond: what was trained lies elsewhere, the same to the bit
    monkeypatch.setattr(unsaved, "PATIENCE", 0.2)
    monkeypatch.setattr(unsaved, "APART", 0.05)
    monkeypatch.setattr(StateWriter, "_may_copy", lambda self: False)  # so a state is complete before the next step
    out, rescued = tmp_path / "out", tmp_path / "rescued"
    with read_only(out) as make_read_only:
        monkeypatch.setattr(saver, "other_folders", lambda *_: iter([out / "inside", rescued]))
        at_steps(monkeypatch, {2: make_read_only})
        blocked = go(world, out, capsys)
        assert blocked.code == 2 and f"the final model is in {rescued} instead" in blocked.err
        assert names(rescued) == ["dog-state", "dog.safetensors"]
        assert_equal_files(rescued / "dog.safetensors", disk / "out" / "dog.safetensors")
        left = {"dog-step00000001.safetensors", "dog-step00000001-state"}
        assert left <= set(names(out)) and not [name for name in names(out) if "step00000002" in name]
    assert blocked.losses == full.losses


def test_what_a_run_leaves_that_is_killed_while_it_saves(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = world.arguments(out, max_train_steps=1, save_every_n_steps=1, save_state=True)
    kill_after(1, "optimizer.bin", ROOT / "train_db.py", words)
    left = [name for name in names(out) if is_temporary(name)]
    assert len(left) == 1 and "-state." in left[0] and "dog-step00000001.safetensors" in names(out)
    again = run(words, capsys, train_db.RECIPE)
    assert again.code == 0, again.err
    assert f"removed what a killed process left of {out / 'dog-step00000001-state'}" in again.out
    assert not [name for name in os.listdir(out) if is_temporary(name) or name.endswith(".lock")]


HOLDER = """
import sys
from pathlib import Path
from library.runtime.run_lock import writing_alone
with writing_alone(Path(sys.argv[1]), "dog", print):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_of_the_same_files_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    refused = go(world, out, capsys)
    assert refused.code == 2 and not refused.losses
    assert f"another run (process {holder.pid} on " in refused.err and "use another --output_name" in refused.err
    assert go(world, out, capsys, dry_run=True).code == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    holder.communicate()
