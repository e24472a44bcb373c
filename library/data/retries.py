"""Read files again that cannot be read at the moment: a network drive may be gone for some seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from library.options.mistakes import UserError

DELAYS = (0.5, 2.0, 5.0)  # seconds before each new attempt

T = TypeVar("T")


class Unreadable(UserError):
    """Raised for files that a run has to read and that stay unreadable."""


def read_all(reads: Sequence[Callable[[], T]], delays: Sequence[float]) -> list[T | Unreadable]:
    """Call all `reads`, and those that raise UserError again after each of the `delays`. Returns the value of each, or
    its last error."""
    results = [_attempt(read) for read in reads]
    for delay in delays:
        failed = [place for place, result in enumerate(results) if isinstance(result, Unreadable)]
        if not failed:
            break
        time.sleep(delay)
        for place in failed:
            results[place] = _attempt(reads[place])
    return results


def read_one(read: Callable[[], T]) -> T:
    """Like `read_all` with DELAYS, for one value. Raises Unreadable."""
    (result,) = read_all([read], DELAYS)
    if isinstance(result, Unreadable):
        raise result
    return result


def _attempt(read: Callable[[], T]) -> T | Unreadable:
    try:
        return read()
    except UserError as error:
        return Unreadable(error.mistakes)
