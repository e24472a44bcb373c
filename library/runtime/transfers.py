"""Copies to the device that nobody waits for.

A plain `tensor.to(device)` waits until the device has finished everything before it. An asynchronous one does not, if
the tensor is in page-locked memory: what was not locked by a data worker is copied there first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reads_locked_memory(device: torch.device) -> bool:
    """Whether a device reads from page-locked main memory by itself. Apple's has one memory with the CPU."""
    return device.type not in {"cpu", "mps"}


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; itself if it is there."""
    if tensor.device == device or tensor.device.type != "cpu":
        return tensor.to(device, non_blocking=True)
    if reads_locked_memory(device) and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def rows_at(tensor: Tensor, places: Sequence[int]) -> Tensor:
    """The rows (len(places), ...) of a tensor on any device, in this order; a row may occur several times. An index
    that is a list would be uploaded while everything waits."""
    return tensor[upload(torch.tensor([*places], dtype=torch.int64), tensor.device)]
