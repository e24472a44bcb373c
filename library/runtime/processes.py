"""Where a second process matters: which rank this one is, who writes files and logs, and what all agree on.

Each rank takes its share of every optimizer step (library/data/order.py). What a rank does on its own must not decide
whether it goes on, else the others wait for it forever: decisions are made from values that are the same everywhere.
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
    """This process among those of the run: `rank` of `world`. The defaults are a run of one process, where nothing is
    communicated and values are given back as they are."""

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Processes:
        """Those of torch's process group, which accelerate opens; without one this process is alone."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return cls()

    @property
    def is_writer(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def sum(self, share: Tensor) -> Tensor:
        """The sum over all ranks, the same on each of them; one NaN makes it NaN everywhere. All ranks must call."""
        if self.world == 1:
            return share
        whole = share.detach().clone()
        torch.distributed.all_reduce(whole)
        return whole

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in their order, on each of them. Picklable. All ranks must call."""
        if self.world == 1:
            return [value]
        values: list[T | None] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]  # each is set by now
