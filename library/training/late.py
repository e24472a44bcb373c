"""Steps that are taken on the device before the host has read their numbers.

Reading waits until the device has finished all that it was told, and the device then waits for the host. So the numbers
of several steps are read together (--loss_read_interval). A step that is not ordinary (a loss or gradient that is not
finite, samples that could not be read) is left out on the device, with all steps after it: the optimizer takes this as
`found_inf`, as from a gradient scaler, and weights, state and averages stay as they were. When the host reads that, it
puts back what it counted meanwhile, and computes those steps again, reading each at once. So the interval changes no
result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from library.training.window import StepNumbers, StepRow, Window


@dataclass(frozen=True)
class Pending:
    """A step that was taken on the device and not read: its number, its window, its row summed over all ranks, and its
    learning rates as they are logged. `put_back`: the host then knows of no step since it."""

    step: int
    window: Window
    row: StepRow
    rates: Mapping[str, float]
    put_back: Callable[[], None]


@dataclass
class Late:
    """What is read late. `interval`: after how many steps at most; 1: nothing is."""

    interval: int = 1
    pending: list[Pending] = field(default_factory=list)
    _held: Tensor | None = None

    def hold(self, row: StepRow) -> Tensor:
        """() float32 on the device: 1 if this step is to be left out, or one before it was; else 0."""
        held = (~row.is_ordinary()).float()
        self._held = held if self._held is None else torch.maximum(self._held, held)
        return self._held

    def read(self) -> list[tuple[Pending, StepNumbers]]:
        """The numbers of all pending steps, which are none then. The one place that waits for the device."""
        pending, self.pending, self._held = self.pending, [], None
        if not pending:
            return []
        values = torch.cat([each.row.values for each in pending]).tolist()
        read, start = [], 0
        for each in pending:
            end = start + len(each.row.values)
            read.append((each, each.row.read(values[start:end])))
            start = end
        return read


def skips_on_device(optimizer: Any) -> bool:
    """Whether an optimizer leaves a step out by a tensor `found_inf`: those of torch with fused kernels, by the
    protocol of torch.amp.GradScaler."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


@contextmanager
def left_out_if(held: Tensor | None, optimizer: Any) -> Iterator[None]:
    """While this is open, a step of the optimizer changes nothing where `held` is 1. None: it does."""
    if held is None:
        yield
        return
    optimizer.found_inf = held
    try:
        yield
    finally:
        del optimizer.found_inf
