"""What is said of a run's memory: a peak that was not predicted, and a card that has run full."""

from __future__ import annotations

from itertools import count

import pytest

from library.training.memory_watch import STEPS, MemoryWatch
from library.training.saving.state import Progress

GB = 10**9


def watched(*paces: float, peak: int | None = 6 * GB, predicted: int | None = 6 * GB, size: int = 8 * GB) -> list[str]:
    """What is said during steps that take so many seconds."""
    told: list[str] = []
    moment, time = Progress(), [0.0]
    watch = MemoryWatch(predicted, size, lambda: peak, told.append, clock=lambda: time[0])
    for step, pace in zip(count(1), paces, strict=False):
        time[0] += pace
        moment.step = step
        watch.due(moment, epoch_ended=False)
    return told


@pytest.mark.parametrize("peak", [5.5, 6.5])
def test_a_peak_near_the_prediction_is_not_mentioned(peak: float) -> None:
    assert not watched(1.0, 1.0, peak=int(peak * GB))


def test_another_peak_is_told_once() -> None:
    (told,) = watched(1.0, 1.0, 1.0, peak=9 * GB)
    assert "50% more than predicted (6.0 GB)" in told
    (told,) = watched(1.0, peak=3 * GB)
    assert "50% less than predicted" in told


def test_slow_steps_on_a_full_card_are_told_once() -> None:
    slow = [1.0] * (STEPS + 1) + [4.0] * (3 * STEPS)
    (told,) = watched(*slow, peak=int(7.9 * GB), predicted=int(7.9 * GB))
    assert "4.0 times as long" in told
    assert "Sysmem Fallback" in told


def test_slow_steps_are_not_blamed_on_a_card_with_room() -> None:
    assert not watched(*[1.0] * (STEPS + 1), *[4.0] * (3 * STEPS))


def test_single_slow_steps_do_not_count() -> None:
    """Validation, saving and drawing make steps slow too."""
    paces = [60.0 if step % 4 == 0 else 1.0 for step in range(5 * STEPS)]
    assert not watched(*paces, peak=int(7.9 * GB), predicted=int(7.9 * GB))


def test_a_cpu_counts_nothing() -> None:
    assert not watched(*[1.0] * (STEPS + 1), *[4.0] * (3 * STEPS), peak=None)
