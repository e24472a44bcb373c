"""What a run and its device exchange in each step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import pytest
import torch

from library.training.steps import Steps
from tests.pretend_device.device import Device, Event


@dataclass
class Step:
    """The events of one step and the bytes of its batches, as they come from the loader."""

    events: list[Event] = field(default_factory=list)
    batch: int = 0

    @property
    def moved(self) -> int:
        """Bytes that were read or uploaded."""
        return sum(event.bytes for event in self.events)


@contextmanager
def recorded_steps(device: Device | None) -> Iterator[list[Step]]:
    """Collect what happens from the arrival of a step's first batch to the update of the weights and of their averages,
    and not what is due after it. Without a device nothing is collected."""
    steps: list[Step] = []
    if device is None:
        yield steps
        return
    current = Step()
    add, take = Steps.add, Steps.take

    def recording_add(self: Steps, request: Any, batch: Any, *rest: Any) -> None:
        begin = len(device.events)
        add(self, request, batch, *rest)
        current.events += device.events[begin:]
        current.batch += _bytes_of(batch)

    def recording_take(self: Steps, *arguments: Any) -> None:
        nonlocal current
        begin = len(device.events)
        take(self, *arguments)
        current.events += device.events[begin:]
        steps.append(current)
        current = Step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Steps, "add", recording_add)
        patch.setattr(Steps, "take", recording_take)
        yield steps


def _bytes_of(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_bytes_of, value.values()))
    return sum(_bytes_of(getattr(value, each.name)) for each in fields(value)) if is_dataclass(value) else 0
