"""What cannot be read at the moment is tried again; all of a batch together, so that it waits only once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from library.data import retries
from library.data.retries import Unreadable, read_all, read_one
from library.options.mistakes import Mistake, UserError


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited, without waiting."""
    seconds: list[float] = []
    monkeypatch.setattr(retries.time, "sleep", seconds.append)
    return seconds


def fails(times: int) -> Callable[[], str]:
    """Fails so many times, then returns how often it was called."""
    calls: list[int] = []

    def read() -> str:
        calls.append(0)
        if len(calls) <= times:
            raise UserError([Mistake(f"attempt {len(calls)}", "repair it")])
        return f"read at attempt {len(calls)}"

    return read


def test_the_delays_are_those_of_the_documentation() -> None:
    assert retries.DELAYS == (0.5, 2.0, 5.0)


def test_what_can_be_read_is_read_once_and_nothing_waits(waited: list[float]) -> None:
    assert read_all([fails(0), fails(0)], (1.0, 2.0)) == ["read at attempt 1"] * 2
    assert not waited


def test_all_that_failed_wait_together_and_only_they_are_read_again(waited: list[float]) -> None:
    assert read_all([fails(2), fails(0), fails(1)], (1.0, 2.0, 4.0)) == [
        "read at attempt 3",
        "read at attempt 1",
        "read at attempt 2",
    ]
    assert waited == [1.0, 2.0]


def test_what_stays_unreadable_is_returned_with_its_last_reason(waited: list[float]) -> None:
    lost, found = read_all([fails(9), fails(0)], (1.0, 2.0))
    assert isinstance(lost, Unreadable) and lost.mistakes == (Mistake("attempt 3", "repair it"),)
    assert found == "read at attempt 1" and waited == [1.0, 2.0]


def test_a_single_value_is_returned_or_raised(waited: list[float]) -> None:
    assert read_one(fails(3)) == "read at attempt 4" and waited == [0.5, 2.0, 5.0]
    with pytest.raises(Unreadable, match="attempt 4"):
        read_one(fails(9))


def test_other_errors_are_not_tried_again(waited: list[float]) -> None:
    def wrong() -> str:
        raise ValueError("a fault of the program")

    with pytest.raises(ValueError, match="a fault of the program"):
        read_all([wrong], (1.0,))
    assert not waited
