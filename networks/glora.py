"""GLoRA: ΔW = W A + B, both of low rank (arXiv 2306.07967, the two terms of equation 10 that LyCORIS implements).

In files (LyCORIS): `a1.weight` (in, dim), `a2.weight` (dim, in), `b1.weight` (out, dim), `b2.weight` (dim, in); for
convolutions with further axes (1, 1), or the kernel (b2); `alpha`. Only loaded, not trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from networks import layer_tensors
from networks.adapter import Layer

_NAMES = ("a1", "a2", "b1", "b2")


class Factor(nn.Module):
    """One matrix, as `weight`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class GLora(nn.Module):
    """One layer's four matrices."""

    alpha: Tensor

    def __init__(self, factors: dict[str, Tensor], alpha: float) -> None:
        super().__init__()
        self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float32))
        for name, factor in factors.items():
            self.add_module(name, Factor(factor))
        self.scale = layer_tensors.scale(alpha, factors["a2"].shape[0])

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW = alpha / dim · (W a1 a2 + b1 b2), of the shape and dtype of `weight`."""
        a1, a2, b1, b2 = (self.get_parameter(f"{name}.weight").to(weight).flatten(1) for name in _NAMES)
        product = torch.einsum("oi...,ir,rj->oj...", weight, a1, a2)
        return (product + (b1 @ b2).reshape(weight.shape)) * self.scale


def load(layer: Layer, tensors: dict[str, Tensor]) -> GLora:
    """Load a layer's tensors. AdapterError for missing tensors and for shapes that do not fit the layer."""
    factors = dict(zip(_NAMES, layer_tensors.take(layer, tensors, *(f"{name}.weight" for name in _NAMES)), strict=True))
    out, inside = layer.shape[:2]
    ones = tuple(1 for _ in layer.shape[2:])
    dim, rank = factors["a2"].shape[0], factors["b2"].shape[0]
    layer_tensors.check_shape(layer, "a1.weight", factors["a1"], (inside, dim, *ones))
    layer_tensors.check_shape(layer, "a2.weight", factors["a2"], (dim, inside, *ones))
    layer_tensors.check_shape(layer, "b1.weight", factors["b1"], (out, rank, *ones))
    layer_tensors.check_shape(layer, "b2.weight", factors["b2"], (rank, inside, *layer.shape[2:]))
    return GLora(factors, layer_tensors.take_alpha(tensors, dim))
