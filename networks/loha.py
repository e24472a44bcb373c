"""LoHa: ΔW is the elementwise product of two low-rank matrices, with a rank of up to dim² (FedPara, arXiv 2108.06098,
Proposition 1; LyCORIS, arXiv 2309.14859, section 3.2).

In files (LyCORIS): `hada_w1_a` (out, dim), `hada_w1_b` (dim, in·kh·kw), `hada_w2_a`, `hada_w2_b`, `alpha`. With
Tucker's cores for convolutions: `hada_t1`, `hada_t2` (dim, dim, kh, kw), and then a is (dim, out), b is (dim, in).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from networks import layer_tensors
from networks.adapter import Layer, LayerSettings
from networks.fused import Cast, lora_linear

_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


class _Product(torch.autograd.Function):
    """(a1 b1) ∘ (a2 b2). The backward pass recomputes both products: keeping them would cost twice the memory of the
    base's weights."""

    @staticmethod
    def forward(ctx: Any, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        ctx.save_for_backward(a1, b1, a2, b2)
        return (a1 @ b1).mul_(a2 @ b2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        a1, b1, a2, b2 = ctx.saved_tensors
        to_first = gradients[0] * (a2 @ b2)
        to_second = gradients[0] * (a1 @ b1)
        return to_first @ b1.mT, a1.mT @ to_first, to_second @ b2.mT, a2.mT @ to_second


class LoHa(nn.Module):
    """One layer's four factors, and two cores if it is Tucker-decomposed."""

    alpha: Tensor
    hada_w1_a: nn.Parameter

    def __init__(self, layer: Layer, tensors: dict[str, Tensor], alpha: float) -> None:
        super().__init__()
        self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float32))
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))
        self.dim = tensors["hada_w1_b"].shape[0]
        self.scale = layer_tensors.scale(self.alpha, self.dim)
        self.layer, self.rank_dropout = layer, 0.0
        self._names = (*_FACTORS, *_CORES) if _CORES[0] in tensors else _FACTORS

    def _load_from_state_dict(self, *given: Any) -> None:
        super()._load_from_state_dict(*given)
        self.scale = layer_tensors.scale(self.alpha, self.dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoHa:  # noqa: FBT001, FBT002 - torch's
        alpha = self.alpha
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.alpha = alpha.to(self.alpha.device)  # stays in float32, so that its value stays exact
        return self

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW = alpha / dim · (w1_a w1_b) ∘ (w2_a w2_b), of the shape and dtype of `weight`."""
        a1, b1, a2, b2 = (self.get_parameter(name).to(weight) for name in _FACTORS)
        a1 = a1 * self.scale
        if len(self._names) == len(_FACTORS):
            product: Tensor = _Product.apply(a1, b1, a2, b2)  # type: ignore[no-untyped-call]
            return product.reshape(weight.shape)
        t1, t2 = (self.get_parameter(name).to(weight) for name in _CORES)
        return _tucker(t1, a1, b1) * _tucker(t2, a2, b2)

    @property
    def bypass(self) -> Callable[[Tensor], Tensor]:
        """ΔW's contribution to the layer's output for x; in training with random outputs dropped, the same ones for all
        samples (kohya's rank dropout for LoHa). AttributeError where W + ΔW is cheaper."""
        if not (self.rank_dropout or self._is_narrow):
            raise AttributeError("bypass")
        return self._beside

    def fused_forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, multiplier: float, cast: Cast = Tensor.to
    ) -> Tensor | None:
        """x · (W + multiplier · ΔW)ᵀ + bias of a Linear layer with a frozen W; None if it cannot be fused."""
        if not self._is_narrow or self.layer.is_conv or (self.training and self.rank_dropout):
            return None
        return lora_linear(x, weight, bias, *self._as_lora(), self.scale * multiplier, cast)

    @property
    def _is_narrow(self) -> bool:
        """Whether a LoRA of rank dim² is cheaper for this layer than forming ΔW."""
        plain = len(self._names) == len(_FACTORS) and self.layer.groups == 1
        return plain and 2 * self.dim**2 <= min(self.layer.shape[0], math.prod(self.layer.shape[1:]))

    def _as_lora(self) -> tuple[Tensor, Tensor]:
        """Down (dim², in·kh·kw) and up (out, dim²) of a LoRA with exactly the same ΔW: the products of every row of b1
        with every row of b2, and of every column of a1 with every column of a2."""
        a1, b1, a2, b2 = (self.get_parameter(name) for name in _FACTORS)
        return (b1[:, None] * b2).flatten(0, 1), (a1[:, :, None] * a2[:, None]).flatten(1)

    def _beside(self, x: Tensor) -> Tensor:
        layer, dtype = self.layer, self.hada_w1_a.dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(dtype)
        if self._is_narrow:
            down, up = self._as_lora()
            down, up = down.reshape(-1, *layer.shape[1:]), up.reshape(*up.shape, *(1 for _ in layer.shape[2:]))
            ranks = self._slide(x, down) * self.scale
            out = functional.conv2d(ranks, up) if layer.is_conv else functional.linear(ranks, up)
        else:
            out = self._slide(x, self.delta(self.hada_w1_a.new_empty(layer.shape)))
        if not (self.training and self.rank_dropout):
            return out
        kept = torch.rand(layer.shape[0], device=out.device) >= self.rank_dropout
        return out * (kept / (1 - self.rank_dropout)).to(out.dtype).reshape((-1, 1, 1) if layer.is_conv else (-1,))

    def _slide(self, x: Tensor, kernel: Tensor) -> Tensor:
        layer = self.layer
        if not layer.is_conv:
            return functional.linear(x, kernel)
        return functional.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation, layer.groups)

    def norm(self) -> Tensor:
        """‖ΔW‖ (Frobenius), of a small dim without forming it."""
        with torch.no_grad():
            if self._is_narrow:
                return layer_tensors.product_norm(*self._as_lora()) * abs(self.scale)
            norm: Tensor = self.delta(self.hada_w1_a.new_empty(self.layer.shape)).float().norm()
            return norm

    @torch.no_grad()
    def rescale(self, ratio: float) -> None:
        """Make ΔW `ratio` times what it is, all factors alike."""
        for name in self._names:
            self.get_parameter(name).mul_(ratio ** (1 / len(self._names)))


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ijhw,ip,jr->prhw", core, a, b)


def create(layer: Layer, settings: LayerSettings, weight: Tensor) -> LoHa:
    """A new LoHa. `w2_a` starts at 0 and the others at random, as in LyCORIS."""
    dim, out = settings.dim, layer.shape[0]
    if settings.own.get("use_tucker") and layer.kernel != (1, 1):
        tensors = {name: torch.empty(dim, layer.shape[name.endswith("b")]) for name in _FACTORS}
        tensors |= {name: torch.empty(dim, dim, *layer.kernel).normal_(std=0.1) for name in _CORES}
    else:
        inside = math.prod(layer.shape[1:])
        tensors = {name: torch.empty((dim, inside) if name.endswith("b") else (out, dim)) for name in _FACTORS}
    tensors["hada_w1_a"].normal_(std=0.1)
    tensors["hada_w1_b"].normal_()
    tensors["hada_w2_a"].zero_()
    tensors["hada_w2_b"].normal_()
    adapter = LoHa(layer, tensors, settings.alpha)
    adapter.rank_dropout = settings.rank_dropout
    return adapter


def load(layer: Layer, tensors: dict[str, Tensor]) -> LoHa:
    """The LoHa of a file. AdapterError for missing tensors and for shapes that do not fit the layer."""
    names = _FACTORS + (_CORES if any(name in tensors for name in _CORES) else ())
    taken = dict(zip(names, layer_tensors.take(layer, tensors, *names), strict=True))
    out, inside = layer.shape[:2]
    for half in ("1", "2"):
        dim = taken[f"hada_w{half}_b"].shape[0]
        if len(names) == len(_FACTORS):
            inside = math.prod(layer.shape[1:])
            layer_tensors.check_shape(layer, f"hada_w{half}_a", taken[f"hada_w{half}_a"], (out, dim))
        else:
            layer_tensors.check_shape(layer, f"hada_t{half}", taken[f"hada_t{half}"], (dim, dim, *layer.kernel))
            layer_tensors.check_shape(layer, f"hada_w{half}_a", taken[f"hada_w{half}_a"], (dim, out))
        layer_tensors.check_shape(layer, f"hada_w{half}_b", taken[f"hada_w{half}_b"], (dim, inside))
    return LoHa(layer, taken, layer_tensors.take_alpha(tensors, taken["hada_w1_b"].shape[0]))
