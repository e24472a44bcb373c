"""Several processes without communication do all of the work, and little of it twice."""

from __future__ import annotations

import pytest

from library.data.cache.work_sharing import processing_order


def test_one_alone_keeps_the_order() -> None:
    assert processing_order("abc", (0, 1)) == ["a", "b", "c"] and processing_order([], (1, 2)) == []


@pytest.mark.parametrize("count", [2, 3, 7])
def test_each_does_everything_and_begins_elsewhere(count: int) -> None:
    orders = [processing_order(range(20), (number, count)) for number in range(count)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({order[0] for order in orders}) == count
    assert orders == [processing_order(range(20), (number, count)) for number in range(count)]


@pytest.mark.parametrize("speeds", [(1, 1), (2, 1), (1, 3), (5, 4, 1), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("late", [0, 150])
def test_little_is_done_twice_however_fast_each_of_them_is(speeds: tuple[int, ...], late: int) -> None:
    """Per tick, a process does `speed` items; the second process starts `late` ticks later."""
    pieces = 2000
    left = [iter(processing_order(range(pieces), (number, len(speeds)))) for number in range(len(speeds))]
    done: set[int] = set()
    efforts = moment = 0
    while len(done) < pieces:
        taken = []
        for number, speed in enumerate(speeds):
            begun = moment >= late or number != 1
            taken += [item for _ in range(speed if begun else 0) for item in _next(left[number], done)]
        efforts += len(taken)
        done.update(taken)  # while they are worked on, nobody sees them
        moment += 1
    assert efforts <= pieces * 1.02


def _next(left, done: set[int]) -> list[int]:
    return next(([item] for item in left if item not in done), [])
