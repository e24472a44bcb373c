"""Round a matrix to a format with the package of that format, and unpack it again.

Packages round. What they have rounded to whole numbers is unpacked here, into memory that all layers share: for 8 bits
that is ten times as fast as the packages' own functions on a CPU, and for fewer bits optimum-quanto compiles an
extension when it unpacks the first weight, which needs a compiler and can wait forever for another process.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from library.runtime.packed_weight import Packed, PackedWeight
from library.training.quantised.formats import BITSANDBYTES, QUANTO, TORCHAO, Format

_LEAST_SCALE = 1e-12  # values that are all zero would be divided by 0
_ALIGNMENT = 64  # bytes
_PIECE = 2**21  # values: rounding them takes about 50 MB for a moment


@dataclass
class Arena:
    """Memory for the packed weights of a module, allocated before the first is packed: weights allocated one by one
    among what rounding needs for a moment would leave holes that fit no other."""

    memory: Tensor
    used: int = 0

    def place(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor in the next free bytes."""
        start = self.used
        self.used += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        return self.memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def make_arena(chosen: Format, shapes: Iterable[tuple[int, ...]], device: torch.device) -> Arena:
    """Memory for weights in this format."""
    size = sum(chosen.nbytes(shape) + 3 * _ALIGNMENT * len(_pieces(shape)) for shape in shapes)
    return Arena(torch.empty(size, dtype=torch.uint8, device=device))


def _pieces(shape: tuple[int, ...]) -> list[slice]:
    """The rows of a weight that are rounded together: a multiple of 64, so that groups of 64 values end with them."""
    rows = max(64, _PIECE // math.prod(shape[1:]) // 64 * 64)
    return [slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


def pack(weight: Tensor, chosen: Format, arena: Arena) -> PackedWeight:
    """Round a dense weight (out, in) or (out, in, kh, kw) to a format, on its device. It unpacks to float32."""
    shape, matrix = tuple(weight.shape), weight.detach().flatten(1)
    packer, group = _PACKERS[chosen.backend.title], chosen.group_in(shape)
    pieces = tuple((rows, packer(matrix[rows].float(), chosen, group).kept_in(arena)) for rows in _pieces(shape))
    return PackedWeight(_Rows(pieces), weight.shape, torch.float32, weight.device)


@dataclass(frozen=True)
class _Rows:
    """A matrix in pieces of some rows."""

    pieces: tuple[tuple[slice, Packed], ...]

    def unpack(self, out: Tensor) -> Tensor:
        for rows, piece in self.pieces:
            piece.unpack(out[rows])
        return out

    def to(self, device: torch.device) -> _Rows:
        return _Rows(tuple((rows, piece.to(device)) for rows, piece in self.pieces))

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for _, piece in self.pieces)


class _Placed(Packed, Protocol):
    def kept_in(self, arena: Arena) -> Packed:
        """The same in the memory of the arena."""


@dataclass(frozen=True)
class _Scaled:
    """Numbers of 8 bits (out, in), each row with a scale (out, 1)."""

    data: Tensor
    scale: Tensor

    def unpack(self, out: Tensor) -> Tensor:
        return out.copy_(self.data).mul_(self.scale.to(out.dtype))

    def to(self, device: torch.device) -> _Scaled:
        return _Scaled(self.data.to(device), self.scale.to(device))

    def kept_in(self, arena: Arena) -> _Scaled:
        return _Scaled(arena.place(self.data), arena.place(self.scale))

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes


@dataclass(frozen=True)
class _Grouped:
    """Numbers of 2 or 4 bits in groups (groups, values), as optimum-quanto packs them: row r of the bytes has group r
    in its lowest bits, then group r + rows, ... Each group has a scale and a shift (groups, 1)."""

    data: Tensor
    bits: int
    scale: Tensor
    shift: Tensor

    def unpack(self, out: Tensor) -> Tensor:
        grouped: Tensor = out.view(len(self.scale), -1)
        for place, groups in enumerate(torch.split(grouped, len(self.data))):
            groups.copy_((self.data[: len(groups)] >> (self.bits * place)) & (2**self.bits - 1))
        grouped.mul_(self.scale.to(out.dtype)).sub_(self.shift.to(out.dtype))
        return out

    def to(self, device: torch.device) -> _Grouped:
        return _Grouped(self.data.to(device), self.bits, self.scale.to(device), self.shift.to(device))

    def kept_in(self, arena: Arena) -> _Grouped:
        return _Grouped(arena.place(self.data), self.bits, arena.place(self.scale), arena.place(self.shift))

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes + self.shift.nbytes


@dataclass(frozen=True)
class _OfBitsandbytes:
    """Numbers of 4 bits and bitsandbytes' state of the quantisation."""

    data: Tensor
    state: Any

    def unpack(self, out: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return out.copy_(dequantize_4bit(self.data, self.state).view(out.shape))

    def to(self, device: torch.device) -> _OfBitsandbytes:
        state = copy.copy(self.state)  # its `to` moves the state itself
        state.to(device)
        return _OfBitsandbytes(self.data.to(device), state)

    def kept_in(self, arena: Arena) -> _OfBitsandbytes:
        self.state.absmax = arena.place(self.state.absmax)
        return _OfBitsandbytes(arena.place(self.data), self.state)

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes + self.state.absmax.nbytes)


def _pack_with_quanto(matrix: Tensor, chosen: Format, group: int) -> _Placed:
    quanto = importlib.import_module("optimum.quanto")
    kind = {"int8": quanto.qint8, "fp8": quanto.qfloat8, "int4": quanto.qint4, "int2": quanto.qint2}[chosen.codes]
    if chosen.group is None:
        scale = quanto.AbsmaxOptimizer()(matrix, kind, 0).clamp(min=_LEAST_SCALE)
        tensor = quanto.quantize_weight(matrix, kind, 0, scale, optimized=False)
        return _Scaled(tensor._data, tensor._scale)
    scale, shift = quanto.MaxOptimizer()(matrix, kind, 0, group)
    scale = scale.clamp(min=_LEAST_SCALE)
    tensor = quanto.quantize_weight(matrix, kind, 0, scale, shift, group_size=group, optimized=False)
    return _Grouped(tensor._data._data, kind.bits, tensor._scale, tensor._shift)


def _pack_with_torchao(matrix: Tensor, chosen: Format, _: int) -> _Placed:
    torchao = importlib.import_module("torchao.quantization")
    kind = {"int8": torchao.Int8Tensor, "fp8": torchao.Float8Tensor}[chosen.codes]
    is_used = matrix.any(1, keepdim=True)  # rows of zeros would become NaN
    tensor = kind.from_hp(matrix.where(is_used, 1), granularity=torchao.PerRow())
    return _Scaled(tensor.qdata, tensor.scale.float().view(-1, 1) * is_used)


def _pack_with_bitsandbytes(matrix: Tensor, chosen: Format, group: int) -> _Placed:
    functional = importlib.import_module("bitsandbytes.functional")
    # rows of whole groups: its CPU kernel unpacks other rows wrongly
    rows = matrix.reshape((-1, group) if matrix.numel() % group == 0 else (1, -1))
    return _OfBitsandbytes(*functional.quantize_4bit(rows, blocksize=group, quant_type=chosen.codes))


_PACKERS: Mapping[str, Callable[[Tensor, Format, int], _Placed]] = MappingProxyType(
    {
        QUANTO.title: _pack_with_quanto,
        TORCHAO.title: _pack_with_torchao,
        BITSANDBYTES.title: _pack_with_bitsandbytes,
    }
)
