"""The processes (ranks) of a run: the rank of this one, which rank writes files and logs, and collectives.

Each rank computes its share of every optimizer step (library/data/order.py). A rank must not stop because of a value of
its own, or the others would wait for it: decide only by values that are equal on all ranks. An error on one rank ends
all of them (library/runtime/meeting.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor

from library.options.mistakes import Mistake, UserError

K = TypeVar("K")
T = TypeVar("T")
_PIECE = 256  # items that are sent at a time


@dataclass(frozen=True)
class Processes:
    """This process in the run: `rank` of `world`. The defaults are a single process, where nothing is communicated and
    values are returned unchanged."""

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Processes:
        """Rank and world size of torch's process group (see meeting.py); a single process without one."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return cls()

    @property
    def is_writer(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """(rank, number of processes)."""
        return self.rank, self.world

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

    def barrier(self) -> None:
        """Wait until all ranks are here. All ranks must call this."""
        if self.world > 1:
            self.sum(torch.zeros(()))

    def agree(self, value: T) -> T:
        """The value of the writer, on every rank. It must be picklable. All ranks must call this."""
        if self.world == 1:
            return value
        values: list[T] = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def in_turn(self) -> Iterator[None]:
        """Yields once on every rank: on the writer first, on the others when its turn is over. All ranks must exhaust
        this."""
        for turn in (True, False) if self.world > 1 else (True,):
            if turn == self.is_writer:
                yield
            self.barrier()

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """If ranks raise a UserError in this context, all raise one of its kind with the mistakes of all, each once.
        All ranks must enter it, and no collective may be in it."""
        if self.world == 1:
            yield
            return
        raised: tuple[type[UserError], tuple[Mistake, ...]] | None = None
        try:
            yield
        except UserError as error:
            raised = type(error), error.mistakes
        found = [each for each in self.gather(raised) if each is not None]
        if found:
            kind, _ = found[0]
            raise kind(dict.fromkeys(mistake for _, mistakes in found for mistake in mistakes))

    def merge(self, own: Mapping[K, T]) -> dict[K, T]:
        """The items of all ranks, on every rank, sent in pieces. Keys and values must be picklable. All ranks must call
        this."""
        if self.world == 1:
            return dict(own)
        items, merged = [*own.items()], dict[K, T]()
        for start in range(0, max(self.gather(len(items))), _PIECE):
            for of_rank in self.gather(items[start : start + _PIECE]):
                merged.update(of_rank)
        return merged

    def total(self, count: int) -> int:
        """The sum of a number over all ranks. All ranks must call this."""
        return sum(self.gather(count))

    def own(self, items: Sequence[T]) -> list[T]:
        """This rank's share of the items: every `world`-th."""
        return list(items[self.rank :: self.world])

    def on_writer(self, call: Callable[..., None]) -> Callable[..., None]:
        """The call, which does nothing on the other ranks."""
        return call if self.is_writer else _nothing


ALONE = Processes()


def _nothing(*_: object, **__: object) -> None:
    """Do nothing."""
