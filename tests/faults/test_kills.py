"""Runs that are killed again and again end as undisturbed ones; what they had started ends with them."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from library.training.run import Run
from tests.tools.filling import ROOT
from tests.training.running import assert_equal_files, make_world, run

POSIX = pytest.mark.skipif(os.name == "nt", reason="forks, and kills by signals")


@POSIX
def test_killed_at_random_moments_and_resumed_a_run_ends_as_if_undisturbed() -> None:
    """At random moments and random calls that write; now and then the newest state is damaged. See benchmarks/soak.py,
    which says how often it was done."""
    words = [sys.executable, "-m", "benchmarks.soak", "--kills", "3", "--seed", "1", "--kinds", "measured"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0 and "0 ends differ" in done.stdout, done.stdout + done.stderr


CHILD = """
import multiprocessing, os, sys, time
from library.runtime.children import end_with_parent
from library.runtime.signals import starting_processes

def work(path):
    end_with_parent()
    for _ in range(60_000):  # answers each time it is asked
        if not os.path.exists(path):
            open(path, "w").close()
        time.sleep(0.01)

if __name__ == "__main__":
    with starting_processes():
        process = multiprocessing.get_context("spawn").Process(target=work, args=(sys.argv[1],), daemon=True)
        process.start()
    print(process.pid, flush=True)
    time.sleep(600)
"""


@POSIX
def test_what_a_killed_process_started_ends_with_it(tmp_path: Path) -> None:
    """And only with it: a terminal and a scheduler send their signals to all processes."""
    program, ready = tmp_path / "program.py", tmp_path / "ready"
    program.write_text(CHILD, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, str(program), str(ready)], stdout=subprocess.PIPE, encoding="utf-8", env=environment
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))

    def lives() -> bool:
        return child.is_running() and child.status() != psutil.STATUS_ZOMBIE

    def answers() -> bool:
        while lives() and not ready.exists():
            time.sleep(0.01)
        return ready.exists()

    assert answers()
    for number in (2, 15, 1):  # SIGINT, SIGTERM, SIGHUP
        child.send_signal(number)
    ready.unlink()  # signals are handled before the next file is made
    assert answers()
    parent.kill()
    parent.wait()
    psutil.wait_procs([child], timeout=60)
    assert not lives()


def test_a_data_worker_that_is_killed_costs_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = make_world(tmp_path / "world")
    flags: dict[str, object] = {"train_batch_size": 2, "max_train_steps": 12, "max_data_loader_n_workers": 1}
    with pytest.MonkeyPatch.context() as patch:
        log = Run.log

        def killing(self: Run, values: dict[str, float], step: int) -> None:
            log(self, values, step)
            for worker in multiprocessing.active_children() if step == 2 else ():
                os.kill(worker.pid or 0, 9)

        patch.setattr(Run, "log", killing)
        stopped = run(world.arguments(tmp_path / "out", **flags), capsys)
    assert stopped.code == 2 and "a process that prepares images died" in stopped.err, stopped.err
    last = max(stopped.losses)
    state = tmp_path / "out" / f"dog-step{last:08d}-state"
    assert f"model and state are saved as of step {last}: continue with --resume {state}" in stopped.err
    flags["max_data_loader_n_workers"] = 0
    resumed = run(world.arguments(tmp_path / "out", **flags, resume="auto"), capsys)
    whole = run(world.arguments(tmp_path / "whole", **flags), capsys)
    assert {**stopped.losses, **resumed.losses} == whole.losses, resumed.err
    assert_equal_files(tmp_path / "out" / "dog.safetensors", tmp_path / "whole" / "dog.safetensors")
