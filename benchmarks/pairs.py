"""Run training commands alternately as separate processes, and measure seconds per step and peak memory.

Progress is read from a command's output: a step has ended whenever the number of finished steps rises. So measuring
does not slow the process down. It is stopped after the last step.
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
    """A command, and the pattern of progress in its output; its group is the number of finished steps."""

    arguments: tuple[str, ...]
    finished: re.Pattern[str]


@dataclass(frozen=True)
class Run:
    """The measurements of a process: seconds from its start to the end of its first step, seconds of each later step,
    peak resident memory in bytes (0 if unknown)."""

    first: float
    steps: tuple[float, ...]
    peak: int

    @property
    def typical(self) -> float:
        """The median of the steps from the third on; earlier ones still allocate memory."""
        return statistics.median(self.steps[1:])


@contextmanager
def running(arguments: Sequence[str]) -> Iterator[tuple[int, Iterator[tuple[float, str]]]]:
    """Start a command. Yields its process id and an iterator of (seconds since its start, output so far), one for each
    new output. The process is killed at the end."""
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
    """Run a command for `steps` steps (3 or more). Raises RuntimeError if it ends earlier."""
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
    """Peak resident memory of a running process in bytes; 0 if unknown (Linux only)."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def alternate(commands: Mapping[str, Command], pairs: int, steps: int) -> dict[str, list[Run]]:
    """Run the commands alternately, `pairs` times each, in reversed order every second time."""
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
    """A row for each command: seconds per step, seconds to the end of the first step, peak memory; then the ratio of
    the first command to the last, for each pair."""
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
    """Median, minimum and maximum."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
