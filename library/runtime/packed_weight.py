"""A frozen weight in a quantised format that acts as the dense weight that it stands for.

Its shape, dtype and device are those of the dense weight. It has no gradient, is never written to, and is kept packed
by autograd: whatever computes with it unpacks it for that one operation. Layers unpack it once in the forward and once
in the backward pass (stored_weights.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Storage = torch.Size | Sequence[int]


class Packed(Protocol):
    """A matrix (out, in) in a format. Several of them may share a format's tables."""

    def unpack(self, out: Tensor) -> Tensor:
        """Write the dense matrix into `out` (out, in) and return it."""

    def to(self, device: torch.device) -> Packed:
        """The same on another device."""

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers and scales."""


class PackedWeight(Tensor):
    """A weight (out, in) or (out, in, kh, kw) that is stored as a packed matrix (out, in · kh · kw). `full`: the weight
    before it was packed, while something is to be compared with it."""

    packed: Packed
    full: Tensor | None = None

    @staticmethod
    def __new__(cls, packed: Packed, shape: Storage, dtype: torch.dtype, device: torch.device) -> PackedWeight:
        """A weight that unpacks to `dtype`."""
        make: Any = Tensor._make_wrapper_subclass
        weight: PackedWeight = make(cls, torch.Size(shape), dtype=dtype, device=device)
        weight.packed = packed
        return weight

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PackedWeight({tuple(self.shape)}, {type(self.packed).__name__}, {self.packed.nbytes} bytes)"

    @property
    def data(self) -> Tensor:
        """The weight outside of autograd."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        """nn.Module.to moves a parameter by this: torch changes its device, and leaves attributes as they are."""
        if not isinstance(value, PackedWeight):
            raise RuntimeError("a quantised weight cannot be changed (data)")
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.packed, self.full = value.packed, value.full

    def unpacked(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """The dense weight, in `out` if that is given."""
        rows = self.shape[0]
        if out is None:
            out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device)
        with torch.no_grad():
            self.packed.unpack(out.view(rows, -1))
        return out

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as torch calls it
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Copies and moves stay packed, everything else computes with the dense weight."""
        named = kwargs or {}
        if function in _SAME:
            return args[0]._like()
        if function is torch.ops.aten._to_copy.default:
            return args[0]._like(named.get("dtype"), named.get("device"))
        if function._schema.is_mutable and isinstance(args[0], PackedWeight):
            raise RuntimeError(f"a quantised weight cannot be changed ({function})")
        dense = (tree_map(_dense, given) for given in (list(args), dict(named)))
        return function(*next(dense), **next(dense))

    def _like(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> PackedWeight:
        device = self.device if device is None else torch.device(device)
        packed = self.packed if device == self.device else self.packed.to(device)
        copy = PackedWeight(packed, self.shape, dtype or self.dtype, device)
        copy.full = self.full
        return copy


_SAME = (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default)


def _dense(value: Any) -> Any:
    return value.unpacked() if isinstance(value, PackedWeight) else value
