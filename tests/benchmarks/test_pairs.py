"""Two commands run in turn and watched by what they print."""

from __future__ import annotations

import re
import sys

import pytest

from benchmarks.pairs import Command, Run, alternate, spread, table, watch

STEP = re.compile(r"^step (\d+)$", re.MULTILINE)


def printing(steps: int, ending: str = "") -> Command:
    """A process that prints so many steps, then something else."""
    code = f"for step in range({steps}): print(f'step {{step + 1}}', flush=True)\n{ending}"
    return Command((sys.executable, "-c", code), STEP)


def test_a_process_is_stopped_after_the_steps_wanted() -> None:
    run = watch(printing(10**9), 4)
    assert len(run.steps) == 3 and run.first > 0 and all(seconds >= 0 for seconds in run.steps)
    if sys.platform.startswith("linux"):
        assert run.peak > 1 << 20


def test_the_output_of_a_process_that_ends_early_is_reported() -> None:
    with pytest.raises(RuntimeError, match="no such file"):
        watch(printing(2, "print('no such file')"), 3)


def test_commands_take_turns_and_so_does_who_begins(capsys: pytest.CaptureFixture[str]) -> None:
    runs = alternate({"one": printing(9), "two": printing(9)}, pairs=3, steps=3)
    assert {name: len(each) for name, each in runs.items()} == {"one": 3, "two": 3}
    names = [line.strip().partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["one", "two", "two", "one", "one", "two"]


def test_the_table_holds_medians_spreads_and_the_ratio_of_each_pair() -> None:
    runs = {
        "one": [Run(9.0, (7.0, 2.0, 3.0, 4.0), 3 << 20), Run(8.0, (7.0, 4.0, 4.0, 4.0), 5 << 20)],
        "two": [Run(9.0, (7.0, 2.0, 2.0, 2.0), 1 << 20), Run(8.0, (7.0, 4.0, 4.0, 4.0), 1 << 20)],
    }
    *_, one, two, _, ratio = table(runs).splitlines()
    assert one == "| one | 3.50 (3.00 to 4.00) | 8.50 (8.00 to 9.00) | 4 (3 to 5) |"
    assert two == "| two | 3.00 (2.00 to 4.00) | 8.50 (8.00 to 9.00) | 1 (1 to 1) |"
    assert ratio.endswith("1.250 (1.000 to 1.500)")
    assert spread([3.0, 1.0, 2.0], 0) == "2 (1 to 3)"
