"""A layer's whole change, as LyCORIS' algo `full` writes it: `diff` of the weight's shape and `diff_b` of the bias'.
For reading: what trains all of a layer is train_db.py."""

from __future__ import annotations

from torch import Tensor, nn

from networks import layer_tensors
from networks.adapter import Layer


class Full(nn.Module):
    """ΔW itself, and what is added to the bias where a file has it."""

    diff_b: nn.Parameter | None

    def __init__(self, diff: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.diff = nn.Parameter(diff)
        self.register_parameter("diff_b", None if bias is None else nn.Parameter(bias))

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW, in the dtype of `weight`."""
        return self.diff.to(weight).reshape(weight.shape)

    def delta_bias(self) -> Tensor | None:
        """What is added to the bias at multiplier 1, (out,), or None."""
        return self.diff_b


def load(layer: Layer, tensors: dict[str, Tensor]) -> Full:
    """The change of a file. AdapterError for missing tensors and for shapes that do not fit the layer."""
    (diff,) = layer_tensors.take(layer, tensors, "diff")
    layer_tensors.check_shape(layer, "diff", diff, layer.shape)
    bias = tensors.pop("diff_b", None)
    if bias is not None:
        layer_tensors.check_shape(layer, "diff_b", bias, layer.shape[:1])
    return Full(diff, bias)
