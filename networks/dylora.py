"""DyLoRA: a LoRA of which every first part of the ranks is an adapter of its own (arXiv 2210.07558, section 4.1, the
variant that updates the last of the chosen ranks only).

Every forward pass of training draws one window of `unit` ranks: it and the ranks before make the output, and it alone
learns. Files are those of a LoRA; each rank that is a multiple of `unit` can be cut out of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from networks import reading
from networks.adapter import AdapterError, Layer, LayerSettings


class Ranks(nn.Module):
    """One factor of a LoRA, in windows of ranks along `axis`. Its state dict is the whole one as `weight`.

    Each window is a parameter of its own, so that an optimizer's momentum and weight decay leave alone those which had
    no part in a step.
    """

    def __init__(self, whole: Tensor, unit: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        for index, window in enumerate(torch.split(whole, unit, axis)):
            self.register_parameter(str(index), nn.Parameter(window.clone(memory_format=torch.contiguous_format)))

    def forward(self, last: int | None = None) -> Tensor:
        """All ranks, or those up to the window `last`, of which only this one gets gradients."""
        windows: list[Tensor] = list(self.parameters())
        if last is None:
            return torch.cat(windows, self.axis)
        return torch.cat([*(window.detach() for window in windows[:last]), windows[last]], self.axis)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:  # noqa: FBT001 - torch's
        whole = self()
        destination[f"{prefix}weight"] = whole if keep_vars else whole.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,  # noqa: FBT001 - torch's
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}weight"
        unexpected_keys += [other for other in state_dict if other.startswith(prefix) and other != key]
        if key not in state_dict:
            missing_keys.append(key)
            return
        windows = list(self.parameters())
        parts = state_dict[key].split(windows[0].shape[self.axis], self.axis)
        if [part.shape for part in parts] != [window.shape for window in windows]:
            error_msgs.append(f"size mismatch for {key}: {tuple(state_dict[key].shape)}, not {tuple(self().shape)}")
            return
        with torch.no_grad():
            for window, part in zip(windows, parts, strict=True):
                window.copy_(part)


class DyLora(nn.Module):
    """One layer's factors: down (dim, in) or (dim, in, kh, kw), up (out, dim) or (out, dim, 1, 1)."""

    alpha: Tensor

    def __init__(self, layer: Layer, down: Tensor, up: Tensor, alpha: float, unit: int) -> None:
        super().__init__()
        if down.shape[0] % unit:
            what = f"unit={unit} does not divide the rank {down.shape[0]} of {layer.name}"
            raise AdapterError(what, "use a divisor of every rank")
        self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float32))
        self.lora_down = Ranks(down, unit, 0)
        self.lora_up = Ranks(up, unit, 1)
        self.layer = layer
        self.dim, self.unit, self.dropout = down.shape[0], unit, 0.0
        self.scale = reading.scale(self.alpha, self.dim)

    def _load_from_state_dict(self, *given: Any) -> None:
        super()._load_from_state_dict(*given)
        self.scale = reading.scale(self.alpha, self.dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DyLora:  # noqa: FBT001, FBT002 - torch's
        alpha = self.alpha
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.alpha = alpha.to(self.alpha.device)  # exact, whatever the precision of the others
        return self

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW of all ranks, alpha / dim · up · down, of the shape and dtype of `weight`."""
        down, up = self.lora_down().to(weight), self.lora_up().to(weight)
        return torch.mm(up.flatten(1) * self.scale, down.flatten(1)).reshape(weight.shape)

    def norm(self) -> Tensor:
        """‖ΔW‖ (Frobenius), without forming it."""
        return reading.product_norm(self.lora_down(), self.lora_up()) * abs(self.scale)

    @torch.no_grad()
    def rescale(self, ratio: float) -> None:
        """Make ΔW `ratio` times what it is, both factors alike."""
        for window in (*self.lora_down.parameters(), *self.lora_up.parameters()):
            window.mul_(math.sqrt(ratio))

    def bypass(self, x: Tensor) -> Tensor:
        """What ΔW adds to the layer's output for x; in training, of the ranks up to a window drawn at random, times
        √(dim / ranks), as the paper's code has it."""
        last, factor = None, self.scale
        if self.training:
            last = int(torch.randint(self.dim // self.unit, ()))  # torch's own numbers: checkpointing repeats them
            factor *= math.sqrt(self.dim / ((last + 1) * self.unit))
        down, up = self.lora_down(last), self.lora_up(last) * factor
        if x.dtype != down.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(down.dtype)
        layer = self.layer
        if not layer.is_conv:
            return functional.linear(functional.dropout(functional.linear(x, down), self.dropout, self.training), up)
        hidden = functional.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        return functional.conv2d(functional.dropout(hidden, self.dropout, self.training), up)


def create(layer: Layer, settings: LayerSettings, weight: Tensor) -> DyLora:
    """A new DyLoRA; up starts at 0. AdapterError if `unit` does not divide the rank."""
    dim = settings.dim
    down = torch.empty(dim, *layer.shape[1:])
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    up = torch.zeros(layer.shape[0], dim, *(1 for _ in layer.shape[2:]))
    adapter = DyLora(layer, down, up, settings.alpha, int(settings.own.get("unit", 1)))
    adapter.dropout = settings.dropout
    return adapter


def load(layer: Layer, tensors: dict[str, Tensor], unit: int = 1) -> DyLora:
    """The LoRA of a file as a DyLoRA. AdapterError for missing tensors, for shapes that do not fit the layer, and for a
    rank that `unit` does not divide."""
    down, up = reading.take(layer, tensors, "lora_down.weight", "lora_up.weight")
    dim = down.shape[0]
    reading.want(layer, "lora_down.weight", down, (dim, *layer.shape[1:]))
    reading.want(layer, "lora_up.weight", up, (layer.shape[0], dim, *(1 for _ in layer.shape[2:])))
    return DyLora(layer, down, up, reading.take_alpha(tensors, dim), unit)
