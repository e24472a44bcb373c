"""A layer of the base model with its adapter, and its forward pass while attached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from networks import dora
from networks.adapter import AdapterError, Kind
from networks.targets import Base, Norm, Target

Forward = Callable[..., Tensor]


class AdaptedLayer:
    """Replaces the `forward` of a layer between `attach` and `detach`. Not a torch module, so that the base's module
    tree does not change."""

    def __init__(self, target: Target, adapter: Any, kind: Kind, module_dropout: float = 0.0) -> None:
        self.target, self.adapter, self.kind = target, adapter, kind
        self.module: Base | Norm = target.module
        self.module_dropout = module_dropout
        self.multiplier = 1.0
        self._before: Forward | None = None  # an earlier replacement of the layer's `forward`
        self._base: Forward | None = None  # None: not attached

    @property
    def name(self) -> str:
        """The layer's name in files."""
        return self.target.layer.name

    @property
    def is_decomposed(self) -> bool:
        """Whether it is a DoRA."""
        return getattr(self.adapter, dora.KEY, None) is not None

    def attach(self) -> None:
        """Add the adapter to the layer's forward pass. Several adapters on one layer add up."""
        if self._base is None:
            self._before, self._base = self.module.__dict__.get("forward"), self.module.forward
            self.module.forward = self.forward  # type: ignore[method-assign, assignment]

    def detach(self) -> None:
        """Restore the forward pass from before `attach`. AdapterError if it was replaced again since."""
        if self._base is None:
            return
        if self.module.__dict__.get("forward") != self.forward:
            raise AdapterError(f"{self.name}: another adapter was attached later", "detach that one first")
        del self.module.forward
        if self._before is not None:
            self.module.forward = self._before  # type: ignore[method-assign]
        self._before = self._base = None

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        """The layer's output with the adapter; at multiplier 0 the base's output, bit for bit."""
        base = self._base
        assert base is not None  # only called while attached
        if self.multiplier == 0 or self._is_dropped():
            return base(x, *more)
        if not self.is_decomposed:
            return self._forward_added(base, x)
        if self.multiplier == 1 and self._is_plain and hasattr(self.adapter, "bypass"):
            return self._forward_scaled(base, x)
        return self._forward_merged(base, x)

    def _is_dropped(self) -> bool:
        """Module dropout: drawn in each forward pass of training from torch's generator, which checkpointing resets."""
        return bool(self.module_dropout and self.adapter.training) and float(torch.rand(())) < self.module_dropout

    @property
    def _is_plain(self) -> bool:
        """Whether the base's forward is that of its class, without another adapter. A replacement that only changes the
        precision says so by an attribute `computes_plainly`."""
        return self._before is None or bool(getattr(self._before, "computes_plainly", False))

    def _fused_forward(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """Base and adapter in one operation, or None if the adapter does not support it."""
        fused = getattr(self.adapter, "fused_forward", None)
        if fused is None or not self._is_plain or not isinstance(self.module, nn.Linear):
            return None
        result: Tensor | None = fused(
            x, self.module.weight, bias, self.multiplier, getattr(self._before, "cast", Tensor.to)
        )
        return result

    def _forward_added(self, base: Forward, x: Tensor) -> Tensor:
        out = self._fused_forward(x, self.module.bias)
        if out is not None:
            return out
        if not hasattr(self.adapter, "bypass"):
            return self._forward_merged(base, x)
        out, delta = base(x), self.adapter.bypass(x)
        if self._is_plain and isinstance(self.module, nn.Conv2d) and out.dtype == delta.dtype:
            return out.add_(delta, alpha=self.multiplier)  # in place: no gradient needs the layer's output
        return torch.add(out, delta, alpha=self.multiplier).to(out.dtype)

    def _forward_scaled(self, base: Forward, x: Tensor) -> Tensor:
        """DoRA at multiplier 1 without forming W': the factors scale the input of W + ΔW, or its output without the
        bias. In float32: bfloat16 rounds a factor near 1 away."""
        factor = dora.factor(self.adapter, _dense(self.module.weight))
        if not dora.is_by_output(factor, self.target.layer.shape):
            return self._forward_added(base, (x * _along(factor, x)).to(x.dtype))
        bias = self.module.bias
        out = self._fused_forward(x, None)
        if out is not None:
            dtype = out.dtype
        else:
            out = self._apply(x, self.module.weight, None) if self._before is None else base(x)
            dtype = out.dtype
            if self._before is not None and bias is not None:
                out = out - _along(bias, out)
            out = out + self.adapter.bypass(x)
        factor = _along(factor, out)
        scaled = out * factor if bias is None else torch.addcmul(_along(bias, out).to(factor.dtype), out, factor)
        return scaled.to(dtype)

    def _forward_merged(self, base: Forward, x: Tensor) -> Tensor:
        """Form ΔW, and compute with W + ΔW if the base is plain and of the adapter's dtype; else compute ΔW's part of
        the output separately. Over a base that is stored smaller, ΔW and what it is made of are formed again in the
        backward pass: of all layers together they would take more memory than is saved."""
        weight, dtype = self.module.weight, next(self.adapter.parameters()).dtype
        if dtype == weight.dtype and self._before is None:
            bias, bias_delta = self.module.bias, self._bias_delta_now()
            if bias is None or bias_delta is None:
                bias = bias_delta if bias is None else bias
            else:
                bias = bias + bias_delta
            return self._apply(x, weight + self.weight_delta(dtype), bias)
        out = base(x)
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(dtype)
        if hasattr(self._before, "cast"):
            beside = checkpoint(self._beside, x, dtype, use_reentrant=False)
        else:
            beside = self._beside(x, dtype)
        return torch.add(out, beside).to(out.dtype)

    def _beside(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """ΔW's part of the output."""
        return self._apply(x, self.weight_delta(dtype), self._bias_delta_now())

    def _bias_delta_now(self) -> Tensor | None:
        delta = self.bias_delta()
        return None if delta is None else delta * self.multiplier

    def bias_delta(self) -> Tensor | None:
        """The change of the base's bias at multiplier 1, or None."""
        delta_bias = getattr(self.adapter, "delta_bias", None)
        delta: Tensor | None = None if delta_bias is None else delta_bias()
        return delta

    def _apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        module = self.module
        if isinstance(module, nn.Linear):
            return functional.linear(x, weight, bias)
        if isinstance(module, nn.LayerNorm):
            return functional.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
        if isinstance(module, nn.GroupNorm):
            return functional.group_norm(x, module.num_groups, weight, bias, module.eps)
        out: Tensor = module._conv_forward(x, weight, bias)
        return out

    def weight_delta(self, dtype: torch.dtype) -> Tensor:
        """The change of the base's weight at the current multiplier, computed in `dtype`."""
        weight = self.module.weight.detach().to(dtype)
        with torch.autocast(weight.device.type, enabled=False):
            if self.is_decomposed:
                weight = _dense(weight)
                return dora.merged_weight(self.adapter, weight, self.multiplier) - weight
            delta: Tensor = self.adapter.delta(weight)
            return delta if self.multiplier == 1 else delta * self.multiplier


def _dense(weight: Tensor) -> Tensor:
    """The weight itself; a quantised one in full, for more than one use of it."""
    unpack = getattr(weight, "unpacked", None)
    return weight if unpack is None else unpack()


def _along(values: Tensor, out: Tensor) -> Tensor:
    """Values per channel, shaped to broadcast to a layer's input or output: channels last, or second for images."""
    return values.view(-1, 1, 1) if out.ndim == 4 else values.flatten()
