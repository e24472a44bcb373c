"""Copies between main memory and a device on a stream of their own, behind what the device computes.

A device without streams (a CPU, Apple's GPUs) copies at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from library.runtime.transfers import reads_locked_memory

Arrival = Any
"""An event of the device: what was copied is there once it has happened. None: it is there."""


class SideStream:
    """The stream for copies of one device. Memory on the device belongs to the stream that computes: it is allocated
    and freed in the order of that stream, and a copy begins when all that was started there before has been computed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams: Any = torch.get_device_module(device) if reads_locked_memory(device) else None
        self._stream = None if self._streams is None else self._streams.Stream(device)

    @property
    def pins(self) -> bool:
        """Whether main memory must be pinned: only then do copies overlap with computing."""
        return self._stream is not None

    def to_host(self, tensor: Tensor) -> tuple[Tensor, Arrival]:
        """A copy in main memory. The tensor may be dropped at once."""
        host = torch.empty_like(tensor, device="cpu", pin_memory=self.pins)
        arrival = self._copy(tensor, host)
        if self._stream is not None:
            tensor.record_stream(self._stream)
        return host, arrival

    def to_device(self, host: Tensor, after: Arrival = None) -> tuple[Tensor, Arrival]:
        """A copy on the device, when `after` has happened. `wait` before it is used or dropped."""
        tensor = torch.empty_like(host, device=self.device)
        if self._stream is not None and after is not None:
            self._stream.wait_event(after)
        return tensor, self._copy(host, tensor)

    def wait(self, arrival: Arrival) -> None:
        """Let what is computed from now on wait for a copy, not the program."""
        if arrival is not None:
            self._streams.current_stream(self.device).wait_event(arrival)

    def _copy(self, source: Tensor, target: Tensor) -> Arrival:
        if self._stream is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(self._streams.current_stream(self.device))
        with self._streams.stream(self._stream), torch.no_grad():
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()
