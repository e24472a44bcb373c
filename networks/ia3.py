"""(IA)³: one learned factor for every output or every input channel of a layer (arXiv 2205.05638, section 3.3).

In files (LyCORIS): `weight`, the factors minus 1, so that 0 changes nothing: (channels,) for a Linear and
(1, channels, 1, 1) for a convolution; and `on_input`, 1 if the factors are for the input. There is no alpha.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from networks import layer_tensors
from networks.adapter import Layer, LayerSettings
from networks.shapes import ia3_on_input, ia3_shape


class Ia3(nn.Module):
    """One layer's factors, minus 1."""

    on_input: Tensor

    def __init__(self, weight: Tensor, on_input: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("on_input", on_input)
        self.scales_input = bool(on_input)

    def _load_from_state_dict(self, *given: Any) -> None:
        super()._load_from_state_dict(*given)
        self.scales_input = bool(self.on_input)

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW = W · w over the input's or the output's channels, of the shape and dtype of `weight`."""
        factors = self.weight.to(weight).flatten()
        shape = (1, -1) if self.scales_input else (-1, 1)
        return weight * factors.reshape(*shape, *(1 for _ in weight.shape[2:]))

    @torch.no_grad()
    def rescale(self, ratio: float) -> None:
        """Multiply ΔW by `ratio`."""
        self.weight.mul_(ratio)


def create(layer: Layer, settings: LayerSettings, weight: Tensor) -> Ia3 | None:
    """Create factors of 1; None for a layer that the paper does not scale, unless enable_all is set. `dim` and `alpha`
    are not used. `settings.own`: enable_all; train_on_input (None: the input for the second layers of feed-forward
    networks, the output for all others)."""
    on_input = ia3_on_input(layer, settings)
    if on_input is None:
        return None
    return Ia3(torch.zeros(ia3_shape(layer, on_input=on_input)), torch.tensor(int(on_input)))


def load(layer: Layer, tensors: dict[str, Tensor]) -> Ia3:
    """Load a layer's tensors. AdapterError for missing tensors and for shapes that do not fit the layer."""
    weight, on_input = layer_tensors.take(layer, tensors, "weight", "on_input", axes=0)
    layer_tensors.check_shape(layer, "weight", weight, ia3_shape(layer, on_input=bool(on_input)))
    return Ia3(weight, on_input.reshape(()))
