"""Work that several processes do without a word between them: each passes over what it finds done.

Each goes through all of it in an order of its own. Were the orders the same from another beginning, a fast process that
has come to where a slow one works would do the same as it from there on, side by side to the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from library.runtime.seeds import python_random

Item = TypeVar("Item")


def own_order(items: Sequence[Item], share: tuple[int, int]) -> list[Item]:
    """All items, in the order of process `share` = (number from 0, of how many). One alone keeps the given order, and
    no two begin at the same item if there are enough."""
    number, count = share
    mine = list(items)
    if count == 1 or not mine:
        return mine
    first = mine.pop(len(mine) * number // count)
    python_random("own order", number).shuffle(mine)
    return [first, *mine]
