"""The formats of quantised weights: bits, scales, and the package that rounds to them. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from library.runtime.device import DEVICES, DeviceKind

Codes = Literal["int8", "fp8", "int4", "int2", "nf4"]
_EVERYWHERE: frozenset[DeviceKind] = frozenset(DEVICES)
_LEAST_GROUP = 16  # smaller groups would need as much memory for scales as for weights


@dataclass(frozen=True)
class Backend:
    """A package: its name, and what to install."""

    title: str
    requirement: str


QUANTO = Backend("optimum-quanto", "optimum-quanto==0.2.7")
TORCHAO = Backend("torchao", "torchao==0.18.0")
BITSANDBYTES = Backend("bitsandbytes", "bitsandbytes==0.50.2")


@dataclass(frozen=True)
class Format:
    """How a matrix (out, in) is stored.

    `bits` per value, and `scales` float32 numbers for every `group` values of a row (None: a whole row); `across`:
    groups may run on into the next row. `devices`: where it can be stored and unpacked. All compute in the format of
    their input, so none of them needs a certain graphics card.
    """

    codes: Codes
    backend: Backend
    bits: int
    group: int | None = None
    scales: int = 1
    across: bool = False
    devices: frozenset[DeviceKind] = _EVERYWHERE

    @property
    def title(self) -> str:
        """Format and package: "int8 (optimum-quanto)"."""
        return f"{self.codes} ({self.backend.title})"

    def group_in(self, shape: tuple[int, ...]) -> int:
        """The number of values that share scales, in a weight of this shape: it divides the rows."""
        row = math.prod(shape[1:])
        return row if self.group is None else self.group if self.across else math.gcd(self.group, row)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape can be stored: a matrix or kernel in groups that are worth it."""
        even = math.prod(shape) * self.bits % 8 == 0
        return len(shape) in (2, 4) and even and self.group_in(shape) >= _LEAST_GROUP

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a weight of this shape with its scales."""
        values = math.prod(shape)
        return values * self.bits // 8 + 4 * self.scales * math.ceil(values / self.group_in(shape))


_NO_MPS: frozenset[DeviceKind] = frozenset({"cuda", "xpu", "cpu"})
_INT8 = Format("int8", QUANTO, 8)
_INT4 = Format("int4", QUANTO, 4, group=128, scales=2)
_FP8 = Format("fp8", QUANTO, 8, devices=_NO_MPS)
_NF4 = Format("nf4", BITSANDBYTES, 4, group=64, across=True, devices=_NO_MPS)

FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "int8": _INT8,
        "int4": _INT4,
        "nf4": _NF4,
        "fp8": _FP8,
        "int8-quanto": _INT8,
        "int4-quanto": _INT4,
        "int2-quanto": Format("int2", QUANTO, 2, group=128, scales=2),
        "fp8-quanto": _FP8,
        "int8-torchao": Format("int8", TORCHAO, 8),
        "fp8-torchao": Format("fp8", TORCHAO, 8, devices=_NO_MPS),
        "nf4-bnb": _NF4,
    }
)
"""Values of --base_model_precision besides no_change."""
