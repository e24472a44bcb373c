"""The change of a normalisation layer's weight and bias, as in files of LyCORIS with train_norm: `w_norm` and `b_norm`,
(channels,). Only loaded, not trained."""

from __future__ import annotations

from torch import Tensor, nn

from networks import layer_tensors
from networks.adapter import Layer


class NormChange(nn.Module):
    """The changes of weight and bias."""

    b_norm: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.w_norm = nn.Parameter(weight)
        self.register_parameter("b_norm", None if bias is None else nn.Parameter(bias))

    def delta(self, weight: Tensor) -> Tensor:
        """The change of the weight at multiplier 1, (channels,), in its dtype."""
        return self.w_norm.to(weight)

    def delta_bias(self) -> Tensor | None:
        """The change of the bias at multiplier 1, (channels,), or None."""
        return self.b_norm


def load(layer: Layer, tensors: dict[str, Tensor]) -> NormChange:
    """Load a layer's tensors. AdapterError for missing tensors and for shapes that do not fit the layer."""
    (weight,) = layer_tensors.take(layer, tensors, "w_norm", axes=1)
    layer_tensors.check_shape(layer, "w_norm", weight, layer.shape)
    bias = tensors.pop("b_norm", None)
    if bias is not None:
        layer_tensors.check_shape(layer, "b_norm", bias, layer.shape)
    return NormChange(weight, bias)
