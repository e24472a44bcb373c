"""The processes (ranks) of a run: the rank of this one, which rank writes files and logs, and collectives.

Each rank computes its share of every optimizer step (library/data/order.py). A rank must not stop because of a value of
its own, or the others would wait for it forever: decide only by values that are equal on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process in the run: `rank` of `world`. The defaults are a single process, where nothing is communicated and
    values are returned unchanged."""

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Processes:
        """Rank and world size of torch's process group, which accelerate creates; a single process without one."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return cls()

    @property
    def is_writer(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def sum(self, share: Tensor) -> Tensor:
        """The sum over all ranks, equal on all; NaN on any rank gives NaN on all. All ranks must call this."""
        if self.world == 1:
            return share
        total = share.detach().clone()
        torch.distributed.all_reduce(total)
        return total

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in order, on every rank. They must be picklable. All ranks must call this."""
        if self.world == 1:
            return [value]
        values: list[T | None] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]  # all are set
