"""The interface of an adapter kind. No torch at module level.

A kind is one file (networks/lora.py, …) with a function `create` and a function `load`, and one row in
networks/registry.py. Both functions return a torch module, an *adapter*, for one layer of the base model:

- its state dict holds the layer's tensors under their names in files (`lora_down.weight`, `lora_up.weight`, `alpha`);
- `delta(weight)` returns ΔW at multiplier 1, differentiable in the adapter's parameters, for the base's weight, which
  is passed in the dtype to compute in;
- `bypass(x)` (optional) returns ΔW's contribution to the layer's output for the input x, cheaper than through ΔW.

Everything else (targets, names, multiplier, module dropout, DoRA's magnitude, merging, files) is in
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
    """A user error: a wrong argument, or a file that does not fit. `remedy` says what to do."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what)
        self.remedy = remedy


@dataclass(frozen=True)
class Layer:
    """A layer of the base model: the shape of its weight, (out, in) or (out, in / groups, kh, kw), and the geometry of
    a convolution."""

    name: str  # as in files: lora_unet_…
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
        """Height and width of the kernel; (1, 1) for a Linear."""
        return (self.shape[2], self.shape[3]) if self.is_conv else (1, 1)


@dataclass(frozen=True)
class LayerSettings:
    """The settings of one layer's adapter. `own` holds the checked arguments that only this kind has (see registry)."""

    dim: int
    alpha: float  # never 0: an alpha of 0, or none, is replaced by `dim`
    dropout: float = 0.0
    rank_dropout: float = 0.0
    own: Mapping[str, Any] = field(default_factory=dict)


class Adapter(Protocol):
    """A torch module for one layer, see the module docstring."""

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW at multiplier 1, of the shape, dtype and device of `weight`, without dropout."""


class Create(Protocol):
    """Create an adapter for a layer, in float32 on the CPU, with ΔW = 0; None if the layer gets no adapter.

    `weight` is the base's, possibly on the meta device; initialisation by SVD needs it. Random numbers come from
    torch's global generator, which the caller seeds for each layer. AdapterError for settings that do not fit it.
    """

    def __call__(self, layer: Layer, settings: LayerSettings, weight: Tensor) -> Any: ...


class Load(Protocol):
    """Build the adapter from a file's tensors of one layer, in their dtype. Removes the tensors it uses from `tensors`,
    so that the caller can report the rest. AdapterError for shapes that do not fit the layer."""

    def __call__(self, layer: Layer, tensors: dict[str, Tensor]) -> Any: ...


@dataclass(frozen=True)
class Argument:
    """One key of --network_args. `read` raises ValueError("is not …")."""

    name: str
    read: Callable[[str], Any]
    help: str
    default: Any = None


@dataclass(frozen=True)
class Kind:
    """A kind of adapter: one row of the registry.

    key_suffixes       endings of file keys; any one of them identifies the kind
    other_prefix       what stands for `lora` at the start of layer names in other programs' files ("": nothing else)
    convolutions       whether it supports 3x3 convolutions
    parts              the modules of a model that it can adapt (None: all)
    file_kind          the kind whose file format it shares ("": its own). A LoRA-FA file is read as a LoRA; such a kind
                       has no key suffixes
    lora_plus          the parameters that LoRA+ trains at the higher learning rate
    unsupported        common arguments (settings.COMMON) that this kind rejects
    shapes             the shapes of a layer's tensors in files (networks/shapes.py); None: it is not trained
    frozen             tensors that are not trained
    is_scaled          whether ΔW is multiplied by alpha / rank
    has_dim            whether --network_dim and --network_alpha mean anything
    readers            the programs that load its files and apply them as this one does (networks/readers.py)
    no_delta_average   why no factors of this kind can be made of the average of ΔW ("": they can)
    complete_settings  checks the settings and may fill in missing ones (dataclasses.replace); raises AdapterError
    """

    name: str
    module: str  # holds `create` and `load`; the name for --network_module
    title: str
    key_suffixes: frozenset[str]
    arguments: tuple[Argument, ...] = ()
    other_prefix: str = ""
    convolutions: bool = True
    decomposes: bool = True  # whether it supports DoRA (use_dora)
    parts: frozenset[str] | None = None
    rescales: bool = True  # whether ΔW can be scaled down (--scale_weight_norms)
    file_kind: str = ""
    lora_plus: frozenset[str] = frozenset()
    unsupported: frozenset[str] = frozenset()
    readers: frozenset[str] = frozenset({"ComfyUI", "A1111"})
    shapes: Callable[[Layer, LayerSettings], dict[str, tuple[int, ...]] | None] | None = None
    frozen: frozenset[str] = frozenset()
    is_scaled: bool = True
    has_dim: bool = True
    no_delta_average: str = ""
    complete_settings: Callable[[NetworkSettings], NetworkSettings] | None = None
