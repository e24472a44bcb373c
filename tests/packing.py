"""Packed weights without a quantiser: whole eighths, one byte each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.runtime.packed_weight import PackedWeight


@dataclass(frozen=True)
class Eighths:
    """Whole numbers of eighths in one byte each."""

    data: Tensor

    def unpack(self, out: Tensor) -> Tensor:
        return out.copy_(self.data).div_(8)

    def to(self, device: torch.device) -> Eighths:
        return Eighths(self.data.to(device))

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def packed(weight: Tensor) -> PackedWeight:
    """A weight whose values are whole eighths, packed."""
    return PackedWeight(Eighths((weight * 8).flatten(1).to(torch.int8)), weight.shape, torch.float32, weight.device)


def pack(layer: nn.Module) -> nn.Module:
    """The layer with its weight packed, rounded to eighths."""
    weight = (layer.weight.detach() * 8).round() / 8
    layer.weight = nn.Parameter(packed(weight), requires_grad=False)
    return layer.requires_grad_(False)
