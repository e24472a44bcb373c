"""Full weight differences, as in files of LyCORIS' algo `full`: `diff` of the weight's shape and `diff_b` of the bias'.
Only loaded; to train all weights use train_db.py."""

from __future__ import annotations

from torch import Tensor, nn

from networks import layer_tensors
from networks.adapter import Layer


class Full(nn.Module):
    """ΔW, and the change of the bias if the file has one."""

    diff_b: nn.Parameter | None

    def __init__(self, diff: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.diff = nn.Parameter(diff)
        self.register_parameter("diff_b", None if bias is None else nn.Parameter(bias))

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW, in the dtype of `weight`."""
        return self.diff.to(weight).reshape(weight.shape)

    def delta_bias(self) -> Tensor | None:
        """The change of the bias at multiplier 1, (out,), or None."""
        return self.diff_b


def load(layer: Layer, tensors: dict[str, Tensor]) -> Full:
    """Load a layer's tensors. AdapterError for missing tensors and for shapes that do not fit the layer."""
    (diff,) = layer_tensors.take(layer, tensors, "diff")
    layer_tensors.check_shape(layer, "diff", diff, layer.shape)
    bias = tensors.pop("diff_b", None)
    if bias is not None:
        layer_tensors.check_shape(layer, "diff_b", bias, layer.shape[:1])
    return Full(diff, bias)
