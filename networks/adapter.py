"""What one adapted layer is made of, and what a kind of adapter has to offer. No torch at module level.

A kind is one file (networks/lora.py, …) with a function `create` and a function `load`, and one row in
networks/registry.py. What it makes is a torch module, an *adapter*, for one layer of the base model:

- its state dict is what files hold of this layer, under these names (`lora_down.weight`, `lora_up.weight`, `alpha`);
- `delta(weight)` is ΔW at multiplier 1, of the shape of the base's weight (which is handed in, in the dtype to compute
  in), differentiable in the adapter's parameters;
- `bypass(x)`, where a kind has it, is what ΔW adds to the layer's output for its input x, cheaper than by way of ΔW.

Everything else (where adapters sit, names, multiplier, dropouts by layer, DoRA's magnitude, merging, files) is in
networks/network.py, once for all kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from networks.settings import NetworkSettings


class AdapterError(ValueError):
    """A wrong argument, or a file that does not fit; `remedy` says what to do. For users: no traceback."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what)
        self.remedy = remedy


@dataclass(frozen=True)
class Layer:
    """A layer of the base model: shape of its weight, (out, in) or (out, in / groups, kh, kw), and for a convolution
    how it goes over its input."""

    name: str  # in files: lora_unet_…
    shape: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def is_conv(self) -> bool:
        """Whether it is a Conv2d; else it is a Linear."""
        return len(self.shape) == 4

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of its kernel; 1, 1 of a Linear."""
        return (self.shape[2], self.shape[3]) if self.is_conv else (1, 1)


@dataclass(frozen=True)
class LayerSettings:
    """What was asked for one layer. `own` are further arguments of the kind, read and checked (see registry)."""

    dim: int
    alpha: float  # never 0: 0 or nothing given means `dim`
    dropout: float = 0.0
    rank_dropout: float = 0.0
    own: Mapping[str, Any] = field(default_factory=dict)


class Adapter(Protocol):
    """A torch module for one layer, see the head of this file."""

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW at multiplier 1, of the shape, dtype and device of `weight`. Dropouts have no part in it."""


class Create(Protocol):
    """A new adapter for a layer, in float32 on the CPU, whose ΔW is 0; None: this layer is to have none. `weight` is
    the base's (it may lie on the meta device): what is made of its SVD needs it. Random numbers come from torch's
    global generator, which the caller has seeded for this layer alone. AdapterError for settings that this layer
    cannot have."""

    def __call__(self, layer: Layer, settings: LayerSettings, weight: Tensor) -> Any: ...


class Load(Protocol):
    """The adapter that a file's tensors of one layer describe, in their dtype. Takes what it uses out of `tensors`, so
    that what is left over can be told. AdapterError for shapes that do not fit the layer."""

    def __call__(self, layer: Layer, tensors: dict[str, Tensor]) -> Any: ...


@dataclass(frozen=True)
class Argument:
    """One key of --network_args that a kind understands. `read` raises ValueError("is no …")."""

    name: str
    read: Callable[[str], Any]
    help: str
    default: Any = None


@dataclass(frozen=True)
class Kind:
    """A kind of adapter: one row of the registry.

    key_suffixes       endings of file keys; any one of them identifies the kind
    prefix             replaces `lora` at the start of layer names in files
    convolutions       whether it supports 3x3 convolutions
    parts              the modules of a model that it can adapt (None: all)
    file_kind          the kind whose file format it shares ("": its own). A LoRA-FA file is read as a LoRA; such a kind
                       has no key suffixes
    lora_plus          the parameters that LoRA+ trains at the higher learning rate
    unsupported        common arguments (settings.COMMON) that this kind rejects
    complete_settings  checks the settings and may fill in missing ones (dataclasses.replace); raises AdapterError
    """

    name: str
    module: str  # holds `create` and `load`; the name for --network_module
    title: str
    key_suffixes: frozenset[str]
    arguments: tuple[Argument, ...] = ()
    prefix: str = "lora"
    convolutions: bool = True
    decomposes: bool = True  # whether DoRA's magnitude (use_dora) can go with it
    parts: frozenset[str] | None = None
    rescales: bool = True  # whether ΔW can be made shorter (--scale_weight_norms)
    file_kind: str = ""
    lora_plus: frozenset[str] = frozenset()
    unsupported: frozenset[str] = frozenset()
    complete_settings: Callable[[NetworkSettings], NetworkSettings] | None = None
