"""Commands that train, run as separate processes in turn and watched from outside: seconds a step and peak memory.

A command is watched by what it prints: its progress is a number in what comes, and every time that the number rises a
step has ended. So the watching costs the watched nothing. After the last step wanted the process is stopped.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """What to run, and how a finished step looks in its output: the pattern's group is the count of finished steps."""

    arguments: tuple[str, ...]
    finished: re.Pattern[str]


@dataclass(frozen=True)
class Run:
    """What was seen of one process: seconds from its start to the end of its first step, seconds of each later step,
    bytes of resident memory at the peak (0 where the system does not tell)."""

    first: float
    steps: tuple[float, ...]
    peak: int

    @property
    def typical(self) -> float:
        """The median of the steps after the second, which still takes memory for the first time."""
        return statistics.median(self.steps[1:])


@contextmanager
def running(arguments: Sequence[str]) -> Iterator[tuple[int, Iterator[tuple[float, str]]]]:
    """Start a command: its process id, and each time that it prints something the seconds since its start and all that
    it has printed by then. On leaving it is killed."""
    started = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    stream = process.stdout
    assert stream is not None

    def read() -> Iterator[tuple[float, str]]:
        printed = ""
        while piece := os.read(stream.fileno(), 1 << 16):
            now = time.perf_counter() - started
            printed += piece.decode("utf-8", errors="replace")
            yield now, printed
        raise RuntimeError(f"{' '.join(arguments)} ended too early:\n{printed[-4000:]}")

    try:
        yield process.pid, read()
    finally:
        process.kill()
        process.wait()
        stream.close()


def watch(command: Command, steps: int) -> Run:
    """Run a command until it has done `steps` steps (3 or more). Raises RuntimeError when it ends before."""
    ends: list[float] = []
    with running(command.arguments) as (process, output):
        for now, printed in output:
            done = max((int(count) for count in command.finished.findall(printed)), default=0)
            ends += [now] * (min(done, steps) - len(ends))
            if len(ends) == steps:
                break
        peak = peak_memory(process)
    return Run(ends[0], tuple(after - before for before, after in zip(ends, ends[1:], strict=False)), peak)


def peak_memory(process: int) -> int:
    """Resident bytes of a living process at its peak; 0 where the system does not tell (only Linux does)."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def alternate(commands: Mapping[str, Command], pairs: int, steps: int) -> dict[str, list[Run]]:
    """Run the commands in turn, `pairs` times each; who begins changes every time."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for turn in range(pairs):
        for name in commands if turn % 2 == 0 else reversed(commands):
            run = watch(commands[name], steps)
            runs[name].append(run)
            each = " ".join(f"{seconds:.2f}" for seconds in run.steps)
            print(
                f"  {name}: first step after {run.first:.2f} s, then {each} s; {run.peak / 2**20:.0f} MiB", flush=True
            )
    return runs


def table(runs: Mapping[str, Sequence[Run]]) -> str:
    """A row for each command: seconds a step, seconds to the end of the first one, peak memory; then the ratio of the
    first command to the last, pair by pair."""
    rows = ["| | seconds a step | first step ends after, s | peak, MiB |", "|---|---|---|---|"]
    for name, each in runs.items():
        peaks = [run.peak / 2**20 for run in each]
        cells = (spread([run.typical for run in each]), spread([run.first for run in each]), spread(peaks, 0))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    first, *_, last = runs
    ratios = [one.typical / other.typical for one, other in zip(runs[first], runs[last], strict=True)]
    rows.append(f"\n{first} / {last}, seconds a step, pair by pair: {spread(ratios, 3)}")
    return "\n".join(rows)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, least and greatest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
