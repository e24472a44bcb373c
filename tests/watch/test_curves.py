"""Curves: all values count, whatever the number of points that are drawn."""

from __future__ import annotations

import math
import random

import pytest

from library.watch.curves import Curve


def curve_of(values: list[float]) -> Curve:
    curve = Curve()
    for step, value in enumerate(values, 1):
        curve.append(step, value)
    return curve


def test_few_values_are_drawn_as_they_are() -> None:
    points = curve_of([3.0, 1.0, 2.0]).thinned(most=3)
    assert points.steps == [1, 2, 3] and points.means == points.lows == points.highs == [3.0, 1.0, 2.0]


def test_a_point_has_the_mean_and_both_ends_of_its_values() -> None:
    points = curve_of([1.0, 3.0, 10.0, 20.0, 7.0]).thinned(most=3)
    assert points.steps == [2, 4, 5]
    assert points.means == [2.0, 15.0, 7.0]
    assert points.lows == [1.0, 10.0, 7.0] and points.highs == [3.0, 20.0, 7.0]


def test_no_peak_is_lost_among_a_hundred_thousand_steps() -> None:
    values = [0.1] * 100_000
    values[31_234], values[77_777] = 5.0, -5.0
    points = curve_of(values).thinned()
    assert len(points.steps) <= 1000 and points.steps[-1] == 100_000
    assert max(points.highs) == 5.0 and min(points.lows) == -5.0
    assert math.fsum(points.means) / len(points.means) == pytest.approx(0.1, rel=1e-3)


def test_a_growing_curve_is_that_of_all_its_values() -> None:
    """What is kept from one drawing to the next changes nothing, also after a resume."""
    randoms = random.Random(1)
    growing, values = Curve(), list[float]()
    for _ in range(60):
        for _ in range(randoms.randrange(9)):
            values.append(randoms.random())
            growing.append(len(values), values[-1])
        if randoms.random() < 0.2:
            del values[len(values) // 2 :]
            growing.rewind(len(values))
        assert growing.thinned(most=16) == curve_of(values).thinned(most=16)


def test_a_step_that_comes_again_replaces_itself_and_all_after() -> None:
    curve = curve_of([1.0, 2.0, 3.0])
    curve.append(2, 5.0)
    assert curve.thinned().steps == [1, 2] and curve.thinned().means == [1.0, 5.0]


def test_values_that_are_not_finite_are_counted() -> None:
    curve = curve_of([1.0, math.nan, math.inf, 2.0])
    curve.rewind(4)
    assert curve.thinned().steps == [1, 4] and list(curve.not_finite) == [2, 3]
    curve.rewind(2)
    assert list(curve.not_finite) == [2]


def test_an_empty_curve_has_no_points() -> None:
    assert Curve().thinned().steps == []
