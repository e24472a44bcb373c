"""Block swap: frozen blocks of the backbone stay in main memory, and are copied to the device before they compute.

A frozen block never changes, so it is copied in one direction only. While a block computes, the next one is on its way,
in the order that the first pass has shown; in the backward pass that order is reversed.

Without gradient checkpointing, autograd would keep the weights of every block on the device from the forward to the
backward pass. What it saves of a block's weights is therefore replaced by where they are (a saved tensor hook), and the
block is copied once more when the backward pass comes to it. A checkpointed block is recomputed there, with weights
that arrive like those of the first pass.

diffusers' group offloading does not do this: it knows the forward pass only. It puts the weights in main memory back
into the same Parameter, so a convolution finds them there in the backward pass, on the wrong device, checkpointed or
not; the transposed weights that Linear layers save keep their blocks on the device until then. It also takes all blocks
of a list or none, where a list is a whole level of a U-Net.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from library.runtime.packed_weight import PackedWeight
from library.runtime.side_stream import Arrival, SideStream

_ALIGNMENT = 64  # bytes: of a tensor in the memory of its block


@dataclass(frozen=True)
class _Place:
    """A plain weight of a block: its dtype, its shape and strides, and its first byte in the block's memory."""

    owner: nn.Module
    name: str
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    start: int

    def of(self, memory: Tensor) -> Tensor:
        """The weight in a copy of the block's memory (bytes,)."""
        return memory.view(self.dtype).as_strided(self.shape, self.stride, self.start // self.dtype.itemsize)


@dataclass(frozen=True, eq=False)
class _Copy:
    """The weights of a block on the device. `packed`: the quantised ones, in the order of the block's."""

    memory: Tensor
    arrival: Arrival
    packed: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Saved:
    """What autograd keeps in place of a weight or a view of it."""

    block: SwappedBlock
    dtype: torch.dtype = torch.float32
    size: Sequence[int] = ()
    stride: Sequence[int] = ()
    offset: int = 0
    packed: int | None = None


@dataclass(eq=False)
class SwappedBlock:
    """A block whose weights are in main memory: `memory` holds the plain ones, (bytes,) uint8, pinned if copies
    overlap. Its parameters are views of that, except while it computes."""

    module: nn.Module
    memory: Tensor = field(init=False)
    places: list[_Place] = field(default_factory=list)
    packed: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)
    at_home: list[nn.Parameter | None] = field(default_factory=list)

    def take_home(self, *, pins: bool) -> None:
        """Move all weights into main memory, and buffers nowhere. Raises ValueError for a block that is trained."""
        plain: list[tuple[_Place, Tensor]] = []
        end = 0
        for owner in self.module.modules():
            for name, weight in owner.named_parameters(recurse=False):
                if weight.requires_grad:
                    raise ValueError(f"{name} of a swapped block is trained")
                if isinstance(weight, PackedWeight):
                    home = nn.Parameter(weight.to("cpu"), requires_grad=False)
                    owner._parameters[name] = home
                    self.packed.append((owner, name, home))
                    continue
                dense = torch.empty_like(weight, device="meta")  # dense strides in the same order
                plain.append((_Place(owner, name, weight.dtype, weight.shape, dense.stride(), end), weight.data))
                end += -(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.memory = torch.empty(end, dtype=torch.uint8, pin_memory=pins)
        for place, given in plain:
            here = place.of(self.memory).copy_(given)
            place.owner._parameters[place.name] = nn.Parameter(here, requires_grad=False)
            self.places.append(place)
        self.at_home = [owner._parameters[name] for owner, name in self._names()]

    def compute_with(self, copied: _Copy) -> None:
        """Let the block compute with its weights on the device."""
        weights = (*(place.of(copied.memory) for place in self.places), *copied.packed)
        for (owner, name), weight in zip(self._names(), weights, strict=True):
            owner._parameters[name] = nn.Parameter(weight, requires_grad=False)

    def go_home(self) -> None:
        """Let the parameters be those in main memory again."""
        for (owner, name), parameter in zip(self._names(), self.at_home, strict=True):
            owner._parameters[name] = parameter

    def _names(self) -> Iterator[tuple[nn.Module, str]]:
        yield from ((place.owner, place.name) for place in self.places)
        yield from ((owner, name) for owner, name, _ in self.packed)


class BlockSwap:
    """Swaps some blocks of a module: at most two of them are on the device at once.

    `say` is told if main memory cannot be pinned.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, say: Callable[[str], None]) -> None:
        self._side = SideStream(device)
        self.blocks = [SwappedBlock(module) for module in blocks]
        self._order: list[SwappedBlock] = []
        self._positions: dict[SwappedBlock, int] = {}
        self._present: dict[SwappedBlock, _Copy] = {}
        self._current: SwappedBlock | None = None
        pins = self._side.pins
        for block in self.blocks:
            pins = self._take_home(block, say, pins=pins)
            block.module.forward = self._swapping(block, block.module.forward)

    @property
    def present(self) -> tuple[SwappedBlock, ...]:
        """The blocks that are on the device now."""
        return tuple(self._present)

    def _take_home(self, block: SwappedBlock, say: Callable[[str], None], *, pins: bool) -> bool:
        """Whether the next block's memory is to be pinned too."""
        try:
            block.take_home(pins=pins)
        except RuntimeError as error:
            if not pins:
                raise
            say(f"main memory cannot be pinned, so swapped blocks arrive more slowly ({error})")
            block.take_home(pins=False)
            return False
        return pins

    def _swapping(self, block: SwappedBlock, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def swapping(*inputs: Any, **named: Any) -> Any:
            with self._computing(block), self._replacing(block):
                return forward(*inputs, **named)

        return swapping

    @contextmanager
    def _computing(self, block: SwappedBlock) -> Iterator[None]:
        with _disable_current_modes():  # that of selective checkpointing counts what a block computes
            block.compute_with(self._arrive(block))
        try:
            yield
        finally:
            block.go_home()

    def _replacing(self, block: SwappedBlock) -> AbstractContextManager[None]:
        """Keeps the block's weights out of what autograd saves. Not in a checkpointed block, whose own hooks must see
        what is saved."""
        if not torch.is_grad_enabled() or _hooks_are_active():
            return nullcontext()
        copied = self._present[block]
        memory = copied.memory.untyped_storage().data_ptr()
        packed = {id(weight.packed): number for number, weight in enumerate(copied.packed)}  # type: ignore[attr-defined]

        def pack(tensor: Tensor) -> Any:
            if isinstance(tensor, PackedWeight):
                number = packed.get(id(tensor.packed))
                return tensor if number is None else _Saved(block, packed=number)
            if not memory or tensor.untyped_storage().data_ptr() != memory:
                return tensor
            return _Saved(block, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

        return torch.autograd.graph.saved_tensors_hooks(pack, self._restore)

    def _restore(self, saved: Any) -> Tensor:
        """The weight again, in the backward pass."""
        if not isinstance(saved, _Saved):
            tensor: Tensor = saved
            return tensor
        copied = self._present[saved.block] if saved.block is self._current else self._arrive(saved.block)
        if saved.packed is not None:
            return copied.packed[saved.packed]
        return copied.memory.view(saved.dtype).as_strided(saved.size, saved.stride, saved.offset)

    def _arrive(self, block: SwappedBlock) -> _Copy:
        """The block's weights on the device, and the next one's on their way."""
        if block not in self._positions:
            self._positions[block] = len(self._order)
            self._order.append(block)
        position = self._positions[block]
        last = -1 if self._current is None else self._positions[self._current]
        following = position + 1 if position == 0 or position > last else position - 1
        ahead = self._order[following] if 0 <= following < len(self._order) else None
        for other in [*self._present]:
            if other not in (block, ahead):
                self._side.wait(self._present.pop(other).arrival)
        self._current = block
        for wanted in (block, ahead):
            if wanted is not None and wanted not in self._present:
                self._present[wanted] = self._fetch(wanted)
        self._side.wait(self._present[block].arrival)
        return self._present[block]

    def _fetch(self, block: SwappedBlock) -> _Copy:
        packed = tuple(weight.to(self._side.device) for _, _, weight in block.packed)
        memory, arrival = self._side.to_device(block.memory)
        return _Copy(memory, arrival, packed)


def _hooks_are_active() -> bool:
    """Whether others hook what autograd saves, as checkpointing does. torch has no public way to ask."""
    ignore_tracing = True
    return torch._C._autograd._top_saved_tensors_default_hooks(ignore_tracing) is not None
