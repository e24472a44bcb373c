"""What a run says while it trains: the time that it will take."""

from __future__ import annotations

from datetime import datetime

import pytest

from library.messages import readable_time
from library.options.parse import parse
from library.training import console
from library.training.console import Console, remaining_time

NOON = datetime(2026, 5, 17, 12, 0)


def test_the_first_step_is_left_out_of_the_time_per_step() -> None:
    """After 60 s for the first step, nine steps of 3.2 s."""
    ends = [60 + 3.2 * number for number in range(10)]
    assert remaining_time(ends, 10, NOON) == (
        "3.2 s per step: the remaining 10 steps take 32 s, until 12:00, without drawing, validation and saving"
    )
    assert "10000 steps take 8 h 53 min, until 20:53," in remaining_time(ends, 10_000, NOON)  # 32,000 s
    assert "27000 steps take 24 h 0 min, until 2026-05-18 12:00," in remaining_time(ends, 27_000, NOON)  # 86,400 s


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.034, "0.034 s"), (3.21, "3.2 s"), (42.4, "42 s"), (150, "2 min"), (3599, "1 h 0 min"), (12_000, "3 h 20 min")],
)
def test_times_are_as_precise_as_somebody_who_waits_needs_them(seconds: float, text: str) -> None:
    assert readable_time(seconds) == text


@pytest.mark.parametrize(("steps", "said"), [(9, 0), (10, 0), (11, 1), (40, 1)])
def test_it_is_said_once_after_ten_steps(steps: int, said: int, capsys: pytest.CaptureFixture[str]) -> None:
    run = Console(parse(["--console_log_simple"]).options.run)
    with run.progress_bar(steps, 0):
        for _ in range(steps):
            run.count_step(0.5)
    assert capsys.readouterr().err.count(" per step: ") == said
    assert console.MEASURED == 10
