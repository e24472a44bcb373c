"""Optimizer state in main memory: it is on the device only while its parameters are stepped.

The step is computed on the device, by the kernels that it has without this, so that the results are the same. Between
steps main memory holds the state, page-locked where a card reads it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.runtime.transfers import reads_locked_memory

if TYPE_CHECKING:
    from torch.optim import Optimizer

_MAIN = torch.device("cpu")


class OffloadedState:
    """Moves the state of parameters to their device and back. Numbers of no dimension (torch's step counters) stay
    where the optimizer wants them."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._kept: dict[nn.Parameter, dict[str, Tensor]] = defaultdict(dict)

    def fetch(self, parameter: nn.Parameter) -> None:
        """Move the state of a parameter to its device."""
        state = self.optimizer.state.get(parameter, {})
        for key, value in state.items():
            if is_moved(value) and value.device != parameter.device:
                self._kept[parameter][key] = value
                state[key] = value.to(parameter.device, non_blocking=True)

    def put_back(self, parameter: nn.Parameter) -> None:
        """Move the state of a parameter to main memory, to where it was before."""
        state = self.optimizer.state.get(parameter, {})
        kept = self._kept.pop(parameter, {})
        for key, value in state.items():
            if is_moved(value) and value.device != _MAIN:
                place = kept.get(key)
                if place is None or place.shape != value.shape or place.dtype != value.dtype:
                    place = _page_locked(value)
                state[key] = place.copy_(value, non_blocking=True)

    def wait(self) -> None:
        """Wait until main memory holds what was put back."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def adopt(self, state: dict[nn.Parameter, dict[str, Any]]) -> None:
        """Keep tensors that were read from a file, without a stay on the device."""
        for parameter, saved in state.items():
            for key, value in saved.items():
                if is_moved(value):
                    self.optimizer.state[parameter][key] = _page_locked(value).copy_(value)


def is_moved(value: Any) -> bool:
    """Whether part of the state of a parameter is moved."""
    # bitsandbytes' paged tensors are in main memory when the device needs the room
    return isinstance(value, Tensor) and value.dim() > 0 and not getattr(value, "is_paged", False)


def _page_locked(value: Tensor) -> Tensor:
    """Room for a tensor in main memory, which a card reads without a copy between."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    locked = accelerator is not None and reads_locked_memory(accelerator)
    return torch.empty(value.shape, dtype=value.dtype, device=_MAIN, pin_memory=locked)
