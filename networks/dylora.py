"""DyLoRA: a LoRA whose first ranks alone are a usable adapter too (arXiv 2210.07558, section 4.1, the variant that
updates only the last of the chosen ranks).

Every forward pass of training draws one window of `unit` ranks. The output uses this window and the ranks before it;
only the window gets gradients. Files are those of a LoRA; every multiple of `unit` can be extracted as a rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from networks import layer_tensors
from networks.adapter import AdapterError, Layer, LayerSettings


class Ranks(nn.Module):
    """One factor of a LoRA, split into windows of ranks along `axis`. Its state dict has the whole factor as `weight`.

    Each window is a parameter of its own, so that the optimizer's momentum and weight decay do not touch windows that
    took no part in a step.
    """

    def __init__(self, whole: Tensor, unit: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        for index, window in enumerate(torch.split(whole, unit, axis)):
            self.register_parameter(str(index), nn.Parameter(window.clone(memory_format=torch.contiguous_format)))

    def forward(self, last: int | None = None) -> Tensor:
        """All ranks, or those up to the window `last`, the only one that gets gradients."""
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
        self.scale = layer_tensors.scale(self.alpha, self.dim)

    def _load_from_state_dict(self, *given: Any) -> None:
        super()._load_from_state_dict(*given)
        self.scale = layer_tensors.scale(self.alpha, self.dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DyLora:  # noqa: FBT001, FBT002 - torch's
        alpha = self.alpha
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.alpha = alpha.to(self.alpha.device)  # stays in float32, so that its value stays exact
        return self

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW = alpha / dim · up · down with all ranks, of the shape and dtype of `weight`."""
        down, up = self.lora_down().to(weight), self.lora_up().to(weight)
        return torch.mm(up.flatten(1) * self.scale, down.flatten(1)).reshape(weight.shape)

    def norm(self) -> Tensor:
        """‖ΔW‖ (Frobenius), without forming it."""
        return layer_tensors.product_norm(self.lora_down(), self.lora_up()) * abs(self.scale)

    @torch.no_grad()
    def rescale(self, ratio: float) -> None:
        """Multiply ΔW by `ratio`, spread evenly over both factors."""
        for window in (*self.lora_down.parameters(), *self.lora_up.parameters()):
            window.mul_(math.sqrt(ratio))

    def bypass(self, x: Tensor) -> Tensor:
        """ΔW's contribution to the layer's output for x. In training only the ranks up to a random window count, times
        √(dim / ranks) as in the paper's code."""
        last, factor = None, self.scale
        if self.training:
            last = int(torch.randint(self.dim // self.unit, ()))  # torch's generator, which checkpointing restores
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
    """Create a DyLoRA; up starts at 0. AdapterError if `unit` does not divide the rank."""
    dim = settings.dim
    down = torch.empty(dim, *layer.shape[1:])
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    up = torch.zeros(layer.shape[0], dim, *(1 for _ in layer.shape[2:]))
    adapter = DyLora(layer, down, up, settings.alpha, int(settings.own.get("unit", 1)))
    adapter.dropout = settings.dropout
    return adapter


def load(layer: Layer, tensors: dict[str, Tensor], unit: int = 1) -> DyLora:
    """Load the tensors of a LoRA as a DyLoRA. AdapterError for missing tensors, for shapes that do not fit the layer,
    and for a rank that `unit` does not divide."""
    down, up = layer_tensors.take(layer, tensors, "lora_down.weight", "lora_up.weight")
    dim = down.shape[0]
    layer_tensors.check_shape(layer, "lora_down.weight", down, (dim, *layer.shape[1:]))
    layer_tensors.check_shape(layer, "lora_up.weight", up, (layer.shape[0], dim, *(1 for _ in layer.shape[2:])))
    return DyLora(layer, down, up, layer_tensors.take_alpha(tensors, dim), unit)
