"""Share work between processes that do not communicate: each skips the items that another has finished.

Each process has a different random order. If they only started at different items of one order, a fast process would
catch up with a slow one, and both would then do the same items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from library.runtime.seeds import python_random

Item = TypeVar("Item")


def processing_order(items: Sequence[Item], share: tuple[int, int]) -> list[Item]:
    """Return all items in the order of process `share` = (rank, number of processes). A single process keeps the order;
    several start at different items if there are enough."""
    rank, count = share
    order = list(items)
    if count == 1 or not order:
        return order
    first = order.pop(len(order) * rank // count)
    python_random("own order", rank).shuffle(order)
    return [first, *order]
