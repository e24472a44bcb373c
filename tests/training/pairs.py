"""Start two processes that go through many runs together (pair_worker.py)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.training.running import Outcome

ROOT = Path(__file__).resolve().parents[2]
HANGS = 600  # seconds after which a pair will never end


@dataclass(frozen=True)
class Case:
    """A run of a recipe's `module` with these words, by its `function(recipe, words)` if it has one; or a call of its
    `function` without words, which returns what JSON can hold."""

    module: str
    words: Sequence[str] = ()
    function: str = ""


def run_pair(cases: Sequence[Case], folder: Path, world: int = 2) -> list[list[Outcome]]:
    """The outcomes of each case, by rank. All cases run in the same `world` processes, one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "cases.json"
    numbered = zip(cases, ports(len(cases)), strict=True)
    described = [{**vars(case), "words": [*case.words], "port": port} for case, port in numbered]
    file.write_text(json.dumps(described), encoding="utf-8")
    results = [folder / f"results-{rank}.json" for rank in range(world)]
    started = [start_rank(rank, world, file, results[rank], folder) for rank in range(world)]
    try:
        for process in started:
            process.wait(HANGS)
    except subprocess.TimeoutExpired:  # ranks that wait for each other: say what they printed
        for process in started:
            process.kill()
            process.wait()
    for rank, process in enumerate(started):
        text = (folder / f"printed-{rank}.txt").read_text(encoding="utf-8", errors="replace")
        assert process.returncode == 0, text
    found: list[list[dict[str, Any]]] = [json.loads(result.read_text(encoding="utf-8")) for result in results]
    return [[_outcome(of_rank) for of_rank in of_case] for of_case in zip(*found, strict=True)]


def start_rank(rank: int, world: int, cases: Path, results: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Start one of the processes as torchrun would, without the agent that watches them."""
    environment = {
        **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with ExitStack() as files:
        printed = files.enter_context((folder / f"printed-{rank}.txt").open("wb"))
        words = [sys.executable, "-m", "tests.training.pair_worker", str(cases), str(results)]
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=printed, stderr=printed)


def ports(count: int) -> list[int]:
    """Free ports."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def _outcome(found: dict[str, Any]) -> Outcome:
    losses = {int(step): loss for step, loss in found["losses"].items()}
    return Outcome(found["code"], found["out"], found["err"], losses)
