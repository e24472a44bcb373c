"""The inputs of checkpointed blocks in main memory, from the forward pass to the backward pass.

What it saves: the inputs of all recomputed blocks but those of two (the one that computes and the one whose inputs are
on their way back). torch's `save_on_cpu` waits for each copy, copies back only when a block needs it, and takes along
what many blocks share, such as the embedding of the timestep. Here copies have a stream of their own, and those of the
block before are fetched while a block computes. Copies are exact.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.runtime.side_stream import Arrival, SideStream


@dataclass(eq=False)
class _Waiting:
    """One input in main memory; `before`: the one that was taken before it. `arriving`: on its way back."""

    host: Tensor
    taken: Arrival | None
    before: weakref.ReferenceType[_Waiting] | None
    arriving: tuple[Tensor, Arrival | None] | None = None


class HostInputs:
    """Takes the inputs of blocks to main memory and back to the device."""

    def __init__(self, device: torch.device) -> None:
        self._side = SideStream(device)
        self._seen: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._last: weakref.ReferenceType[_Waiting] | None = None
        self._ahead: _Waiting | None = None

    @contextmanager
    def taking(self, inputs: Sequence[Any]) -> Iterator[None]:
        """While this is open, tensors of `inputs` that are saved for the backward pass go to main memory.

        Those without a gradient (captions) and those that an earlier block got too stay on the device: others hold them
        anyway.
        """
        self._drop_ahead()
        taken = set()
        for tensor in inputs:
            if isinstance(tensor, Tensor) and tensor.requires_grad and self._seen.get(id(tensor)) is not tensor:
                self._seen[id(tensor)] = tensor
                taken.add(tensor.data_ptr())

        def pack(tensor: Tensor) -> Any:
            return self._take(tensor) if tensor.data_ptr() in taken else tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, self._return):
            yield

    def _take(self, tensor: Tensor) -> _Waiting:
        host, taken = self._side.to_host(tensor)
        waiting = _Waiting(host, taken, self._last)
        self._last = weakref.ref(waiting)
        return waiting

    def _return(self, saved: Any) -> Tensor:
        if not isinstance(saved, _Waiting):
            tensor: Tensor = saved
            return tensor
        tensor, arrival = self._fetch(saved)
        self._side.wait(arrival)
        saved.arriving = None
        before = None if saved.before is None else saved.before()
        if before is not self._ahead:
            self._drop_ahead()
        if before is not None:
            self._fetch(before)
        self._ahead = before
        return tensor

    def _fetch(self, waiting: _Waiting) -> tuple[Tensor, Arrival]:
        if waiting.arriving is None:
            waiting.arriving = self._side.to_device(waiting.host, waiting.taken)
        return waiting.arriving

    def _drop_ahead(self) -> None:
        """Drop what was fetched but not used: its memory must not be used again before it has arrived."""
        if self._ahead is not None and self._ahead.arriving is not None:
            self._side.wait(self._ahead.arriving[1])
            self._ahead.arriving = None
        self._ahead = None
