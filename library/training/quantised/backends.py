"""Round a matrix to a format with the package of that format, and unpack it again.

Packages round. What they have rounded to whole numbers is unpacked here, into memory that all layers share: for 8 bits
that is ten times as fast as the packages' own functions on a CPU, and for fewer bits optimum-quanto compiles an
extension when it unpacks the first weight, which needs a compiler and can wait forever for another process.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from library.runtime.packed_weight import Packed, PackedWeight
from library.training.quantised.formats import BITSANDBYTES, QUANTO, TORCHAO, Format

_LEAST_SCALE = 1e-12  # values that are all zero would be divided by 0


def pack(weight: Tensor, chosen: Format) -> PackedWeight:
    """Round a dense weight (out, in) or (out, in, kh, kw) to a format, on its device. It unpacks to float32."""
    matrix = weight.detach().float().flatten(1)
    packed = _PACKERS[chosen.backend.title](matrix, chosen, chosen.group_in(tuple(weight.shape)))
    return PackedWeight(packed, weight.shape, torch.float32, weight.device)


@dataclass(frozen=True)
class _Scaled:
    """Numbers of 8 bits (out, in), each row with a scale (out, 1)."""

    data: Tensor
    scale: Tensor

    def unpack(self, out: Tensor) -> Tensor:
        return out.copy_(self.data).mul_(self.scale.to(out.dtype))

    def to(self, device: torch.device) -> _Scaled:
        return _Scaled(self.data.to(device), self.scale.to(device))

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes


@dataclass(frozen=True)
class _Grouped:
    """Numbers of 2 or 4 bits in groups (groups, values), as optimum-quanto packs them: byte row r has group r in its
    lowest bits, then group r + rows, ... Each group has a scale and a shift (groups, 1)."""

    data: Tensor
    bits: int
    scale: Tensor
    shift: Tensor

    def unpack(self, out: Tensor) -> Tensor:
        grouped = out.view(len(self.scale), -1)
        for place, groups in enumerate(grouped.split(len(self.data))):
            numbers = (self.data[: len(groups)] >> (self.bits * place)) & (2**self.bits - 1)
            groups.copy_(numbers)
        grouped.mul_(self.scale.to(out.dtype)).sub_(self.shift.to(out.dtype))
        return out

    def to(self, device: torch.device) -> _Grouped:
        return _Grouped(self.data.to(device), self.bits, self.scale.to(device), self.shift.to(device))

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

        dense: Tensor = dequantize_4bit(self.data, self.state).to(out.dtype)
        return dense.view(out.shape)

    def to(self, device: torch.device) -> _OfBitsandbytes:
        state = copy.copy(self.state)  # its `to` moves the state itself
        state.to(device)
        return _OfBitsandbytes(self.data.to(device), state)

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes + self.state.absmax.nbytes)


def _pack_with_quanto(matrix: Tensor, chosen: Format, group: int) -> Packed:
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


def _pack_with_torchao(matrix: Tensor, chosen: Format, _: int) -> Packed:
    torchao = importlib.import_module("torchao.quantization")
    kind = {"int8": torchao.Int8Tensor, "fp8": torchao.Float8Tensor}[chosen.codes]
    is_used = matrix.any(1, keepdim=True)  # rows of zeros would become NaN
    tensor = kind.from_hp(matrix.where(is_used, 1), granularity=torchao.PerRow())
    return _Scaled(tensor.qdata, tensor.scale.float().view(-1, 1) * is_used)


def _pack_with_bitsandbytes(matrix: Tensor, chosen: Format, group: int) -> Packed:
    functional = importlib.import_module("bitsandbytes.functional")
    # rows of whole groups: its CPU kernel unpacks other rows wrongly
    rows = matrix.reshape((-1, group) if matrix.numel() % group == 0 else (1, -1))
    return _OfBitsandbytes(*functional.quantize_4bit(rows, blocksize=group, quant_type=chosen.codes))


_PACKERS: Mapping[str, Callable[[Tensor, Format, int], Packed]] = MappingProxyType(
    {
        QUANTO.title: _pack_with_quanto,
        TORCHAO.title: _pack_with_torchao,
        BITSANDBYTES.title: _pack_with_bitsandbytes,
    }
)
