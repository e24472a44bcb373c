"""Running means are those of math.fsum over all values, bit for bit."""

from __future__ import annotations

import math
import random

import pytest

from library.training.running_means import RunningMeans


def test_running_means_are_exact_over_epochs_of_any_length() -> None:
    draw = random.Random(4)
    means, before = RunningMeans(), list[float]()
    for steps in (7, 300, 5, 40):  # a resumed run has a shorter or longer epoch before
        now: list[float] = []
        assert math.isnan(means.of_epoch(now))
        for _ in range(steps):
            now.append(draw.choice((1, -1)) * 10 ** draw.uniform(-30, 6))
            assert means.of_epoch(now) == math.fsum(now) / len(now)
            last = now + before[len(now) :]
            assert means.moving(now, before) == math.fsum(last) / len(last)
        before = now


def test_each_value_is_added_once() -> None:
    """Else a step would take longer the more steps an epoch has."""
    read: list[int] = []

    class Values(list[float]):
        def __getitem__(self, key: object) -> object:  # type: ignore[override]
            assert isinstance(key, slice)
            read.append(len(range(*key.indices(len(self)))))
            return super().__getitem__(key)

    means, now, before = RunningMeans(), Values(), Values([0.5] * 60)
    for _ in range(50):
        now.append(0.25)
        means.moving(now, before)
        means.of_epoch(now)
    assert sum(read) == 50 + 60 + 50


def test_values_that_are_not_finite_are_refused() -> None:
    for value in (math.nan, math.inf):
        with pytest.raises((ValueError, OverflowError)):
            RunningMeans().of_epoch([value])
