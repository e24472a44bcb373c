"""LoRA on Linear layers and convolutions (arXiv 2106.09685): ΔW = alpha / r · B A.

In files: `lora_down.weight` (A: (r, in) or (r, in, kh, kw)), `lora_up.weight` (B: (out, r) or (out, r, 1, 1)), `alpha`
(0-dimensional). LyCORIS' files may also have `lora_mid.weight` (r, r, kh, kw), a Tucker core between 1x1 A and B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from networks import layer_tensors, pissa
from networks.adapter import AdapterError, Layer, LayerSettings
from networks.fused import Cast, lora_linear


class Factor(nn.Module):
    """A matrix or kernel, named as in files (`lora_down` with a `weight`)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class Lora(nn.Module):
    """The two factors of one layer. `start`: (A0, B0), whose product is subtracted (see networks/pissa.py)."""

    alpha: Tensor
    start_down: Tensor | None
    start_up: Tensor | None

    def __init__(
        self,
        layer: Layer,
        down: Tensor,
        up: Tensor,
        alpha: float,
        *,
        mid: Tensor | None = None,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.rank = down.shape[0]
        self.dropout = 0.0
        self.rank_dropout = 0.0
        self.lora_down = Factor(down)
        self.lora_up = Factor(up)
        self.lora_mid = None if mid is None else Factor(mid)
        self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float32))
        self.register_buffer("start_down", start[0] if start else None)
        self.register_buffer("start_up", start[1] if start else None)
        self.scale = float(self.alpha) / up.shape[1]  # from the float32 value that files have

    def _load_from_state_dict(self, *given: Any) -> None:
        super()._load_from_state_dict(*given)
        self.scale = float(self.alpha) / self.lora_up.weight.shape[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Lora:  # noqa: FBT001, FBT002 - torch's
        alpha = self.alpha
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.alpha = alpha.to(self.alpha.device)  # stays in float32: rsLoRA's alpha has many digits
        return self

    @property
    def is_dropping(self) -> bool:
        """Whether dropout is active."""
        return self.training and bool(self.dropout or self.rank_dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B, followed by the start's with a negative sign."""
        down, up = self.lora_down.weight, self.lora_up.weight
        if self.start_down is None or self.start_up is None:
            return down, up
        return torch.cat([down, self.start_down.to(down.dtype)]), torch.cat([up, -self.start_up.to(up.dtype)], 1)

    @property
    def product(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """The trained A and B; None with a Tucker core between them."""
        return (self.lora_down.weight, self.lora_up.weight) if self.lora_mid is None else None

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW, of the shape, dtype and device of `weight`."""
        down, up = (factor.to(weight) for factor in self.factors())
        if self.lora_mid is None:
            return (self.scale * (up.flatten(1) @ down.flatten(1))).view(weight.shape)
        mid = self.lora_mid.weight.to(weight)
        return self.scale * torch.einsum("or,rskl,si->oikl", up.flatten(1), mid, down.flatten(1))

    def bypass(self, x: Tensor) -> Tensor:
        """ΔW's contribution to the layer's output for the input x: (..., in) -> (..., out), or (n, in, h, w)."""
        down, up = self.factors()
        if x.dtype != down.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(down.dtype)
        layer = self.layer
        if not layer.is_conv:
            return functional.linear(self._apply_dropout(functional.linear(x, down), -1) * self.scale, up)
        if self.lora_mid is None:
            ranks = functional.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
        else:
            mid = self.lora_mid.weight
            ranks = functional.conv2d(
                functional.conv2d(x, down), mid, None, layer.stride, layer.padding, layer.dilation
            )
        return functional.conv2d(self._apply_dropout(ranks, 1) * self.scale, up)

    def _apply_dropout(self, ranks: Tensor, axis: int) -> Tensor:
        """A x with dropout, in training. The ranks of a start are dropped together with those that they are subtracted
        from, so that dropout applies to the change, never to the base."""
        if not self.is_dropping:
            return ranks
        halves: Tensor = ranks.unflatten(axis, (-1, self.rank))  # type: ignore[no-untyped-call]
        across = axis if axis < 0 else axis + 1  # the axis of the ranks, after that of the halves
        shape = list(halves.shape)
        shape[across - 1] = 1
        kept = functional.dropout(ranks.new_ones(shape), self.dropout)
        if self.rank_dropout:  # one mask for all positions of a sample
            once = [1] * len(shape)
            once[0], once[across] = shape[0], self.rank
            mask = torch.rand(once, device=ranks.device) >= self.rank_dropout
            kept = kept * mask / (1 - self.rank_dropout)
        dropped: Tensor = halves * kept
        return dropped.flatten(across - 1, across)

    def fused_forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, multiplier: float, cast: Cast = Tensor.to
    ) -> Tensor | None:
        """x · (W + multiplier · ΔW)ᵀ + bias of a Linear layer with a frozen W; None if it cannot be fused."""
        if self.layer.is_conv or self.is_dropping:
            return None
        return lora_linear(x, weight, bias, *self.factors(), self.scale * multiplier, cast)

    def merged_norms(self, weight: Tensor, dtype: torch.dtype, *, by_output: bool) -> Tensor | None:
        """‖W + ΔW‖ of each output (out, 1, …) or input (1, in, …) in `dtype`, without forming ΔW. With ΔW = s B A:
        |w + sbA|² = |w|² + 2s b(Aw) + s² b(AAᵀ)b of a row, |w + sBa|² = |w|² + 2s (wᵀB)a + s² aᵀ(BᵀB)a of a column."""
        if self.lora_mid is not None:
            return None
        base = weight.to(dtype).flatten(1)
        down, up = (factor.to(dtype).flatten(1) for factor in self.factors())
        up = up * self.scale
        if by_output:
            mixed = torch.addmm(base @ down.T, up, down @ down.T, beta=2)
            squares = torch.linalg.vector_norm(base, dim=1).square() + (up * mixed).sum(1)
        else:
            mixed = torch.addmm(up.T @ base, up.T @ up, down, beta=2)
            squares = torch.linalg.vector_norm(base, dim=0).square() + (down * mixed).sum(0)
            squares = squares.view(weight.shape[1], -1).sum(1)  # over the kernel
        ones = [1] * (weight.ndim - 2)
        lengths: Tensor = squares.clamp(min=0).sqrt()
        return lengths.view(-1, 1, *ones) if by_output else lengths.view(1, -1, *ones)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """‖ΔW‖ (Frobenius), without forming it: the sum of (BᵀB) * (AAᵀ)."""
        down, up = (factor.flatten(1) for factor in self.factors())
        down, up = (factor if factor.dtype is torch.float64 else factor.float() for factor in (down, up))
        if self.lora_mid is not None:
            down = self.delta(down.new_empty(self.layer.shape)).flatten(1)
            return torch.sqrt((down * down).sum())
        return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt() * abs(self.scale)

    @torch.no_grad()
    def rescale(self, ratio: float) -> None:
        """Multiply ΔW by `ratio`, spread evenly over both factors. AdapterError with a start, which is fixed."""
        if self.start_down is not None:
            raise AdapterError("--scale_weight_norms cannot be combined with init=pissa", "remove one of them")
        self.lora_down.weight.mul_(math.sqrt(ratio))
        self.lora_up.weight.mul_(math.sqrt(ratio))

    def file_tensors(self) -> dict[str, Tensor]:
        """The tensors in files. They are relative to the base model, so a start doubles the rank and alpha."""
        if self.start_down is None:
            return dict(self.state_dict())
        down, up = (factor.detach() for factor in self.factors())
        alpha = self.alpha * (down.shape[0] / self.rank)
        return {"alpha": alpha, "lora_down.weight": down, "lora_up.weight": up}


def create(layer: Layer, settings: LayerSettings, weight: Tensor) -> Lora:
    """Create a LoRA: A Kaiming-uniform with a = √5, B = 0; or both from the base's SVD (init=pissa)."""
    down = torch.empty(settings.dim, *layer.shape[1:])
    up = torch.zeros(layer.shape[0], settings.dim, *([1, 1] if layer.is_conv else []))
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    start = None
    if settings.own.get("init") == "pissa":
        scale = settings.alpha / settings.dim
        start = pissa.principal_factors(layer, weight, settings.dim, scale)
        down, up = (factor.clone() for factor in start)
    adapter = Lora(layer, down, up, settings.alpha, start=start)
    adapter.dropout, adapter.rank_dropout = settings.dropout, settings.rank_dropout
    return adapter


def load(layer: Layer, tensors: dict[str, Tensor]) -> Lora:
    """Load a layer's tensors; 1x1 kernels are accepted for a Linear layer, and matrices for 1x1 kernels. AdapterError
    for missing tensors and for shapes that do not fit the layer."""
    down, up = layer_tensors.take(layer, tensors, "lora_down.weight", "lora_up.weight")
    mid = tensors.pop("lora_mid.weight", None)
    rank, ones = up.shape[1], ([1, 1] if layer.is_conv else [])
    kernel = layer.shape[2:] if mid is None else ones
    shapes = {
        "lora_down.weight": (down.shape[0], layer.shape[1], *kernel),
        "lora_up.weight": (layer.shape[0], rank, *ones),
    }
    down, up = (
        _reshaped(layer, name, tensor, shape) for (name, shape), tensor in zip(shapes.items(), (down, up), strict=True)
    )
    if mid is not None:
        layer_tensors.check_shape(layer, "lora_mid.weight", mid, (rank, down.shape[0], *layer.shape[2:]))
    elif down.shape[0] != rank:
        raise layer_tensors.shape_error(layer, f"lora_down has {down.shape[0]} ranks, lora_up {rank}")
    alpha = float(layer_tensors.take_alpha(tensors, rank)) or float(rank)
    return Lora(layer, down, up, alpha, mid=mid)


def _reshaped(layer: Layer, name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor in this shape, which may differ by axes of length 1 (1x1 kernels and matrices)."""
    if [size for size in tensor.shape if size > 1] != [size for size in shape if size > 1]:
        layer_tensors.check_shape(layer, name, tensor, shape)
    return tensor.reshape(tuple(shape))
