"""Tensors with known shape and dtype that are read when needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from library.checkpoints.header import ITEM_SIZES, Place, TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "I16": "int16",
    "U16": "uint16", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32",
    "C64": "complex64", "F64": "float64", "I64": "int64", "U64": "uint64",
}  # fmt: skip


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype name ("F16" -> torch.float16)."""
    import torch

    dtype = getattr(torch, _TORCH_NAMES[name])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(name)
    return dtype


@cache  # of each tensor of a model
def dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a torch dtype (torch.float16 -> "F16"). Raises KeyError if there is none."""
    return {torch_dtype(name): name for name in ITEM_SIZES}[dtype]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read by `load`.

    may_be_infinite: writing does not check for infinite values; for buffers copied from a source file, some of which
    are infinite by design (a causal mask; a schedule that ends in pure noise).
    place: location of its unchanged bytes in a file, so that they can be copied directly (None: not in a file).
    """

    info: TensorInfo
    load: Callable[[], Tensor]
    may_be_infinite: bool = False
    place: Place | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.info.shape

    @property
    def dtype(self) -> str:
        """Its dtype by the safetensors name ("F16")."""
        return self.info.dtype

    @staticmethod
    def of(tensor: Tensor | LazyTensor) -> LazyTensor:
        """Wrap a tensor; a lazy tensor is returned unchanged."""
        if isinstance(tensor, LazyTensor):
            return tensor
        return LazyTensor(TensorInfo(dtype_name(tensor.dtype), tuple(tensor.shape)), lambda: tensor.detach())

    def reshape(self, shape: tuple[int, ...]) -> LazyTensor:
        """Return the same values in another shape."""
        if shape == self.shape:
            return self
        load = self.load
        return replace(self, info=TensorInfo(self.dtype, shape), load=lambda: load().reshape(shape))

    def transposed(self) -> LazyTensor:
        """Return the transpose of a matrix, (a, b) -> (b, a)."""
        a, b = self.shape
        return LazyTensor(TensorInfo(self.dtype, (b, a)), lambda: self.load().T.contiguous())

    def rows(self, start: int, end: int) -> LazyTensor:
        """Return rows start..end-1 of the first dimension."""
        info = TensorInfo(self.dtype, (end - start, *self.shape[1:]))
        place = self.place
        if place is not None and place.start is not None:
            above = TensorInfo(self.dtype, (start, *self.shape[1:])).nbytes
            place = replace(place, start=place.start + above)
        return LazyTensor(info, lambda: self.load()[start:end], place=place)

    def cast(self, dtype: str) -> LazyTensor:
        """Convert to another floating-point dtype; integer tensors are unchanged."""
        if dtype == self.dtype or not self.info.is_float:
            return self
        load = self.load
        return replace(self, info=TensorInfo(dtype, self.shape), load=lambda: load().to(torch_dtype(dtype)), place=None)


def stacked(parts: list[LazyTensor]) -> LazyTensor:
    """Concatenate tensors of the same width along dimension 0."""

    def load() -> Tensor:
        import torch

        return torch.cat([part.load() for part in parts])

    rows = sum(part.shape[0] for part in parts)
    return LazyTensor(TensorInfo(parts[0].dtype, (rows, *parts[0].shape[1:])), load)
