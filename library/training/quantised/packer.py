"""Quantise the weights of a base model one by one: while it is loaded, or afterwards."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from library.runtime.stored_weights import compute_in_fp32
from library.training.quantised.backends import pack

if TYPE_CHECKING:
    from library.families.family import Model, Pack
    from library.training.quantised.plan import Quantisation


def packer(quantisation: Quantisation) -> Pack:
    """What loading calls for each weight, so that the full model is never in memory."""
    return partial(_pack, quantisation)


def quantise(model: Model, quantisation: Quantisation) -> None:
    """Quantise a model that has been loaded in full, for adapters to be merged into it."""
    for module_name, module in model.modules().items():
        for layer_name, layer in module.named_modules():
            weight = getattr(layer, "weight", None)
            if isinstance(weight, nn.Parameter):
                packed = _pack(quantisation, module_name, f"{layer_name}.weight", weight.detach())
                layer.weight = nn.Parameter(packed, requires_grad=False)
        if module_name in quantisation.modules:
            compute_in_fp32(module)


def _pack(quantisation: Quantisation, module: str, name: str, weight: Tensor) -> Tensor:
    """The weight in its format, or unchanged if it has none. With a probe it keeps the full one, to compare with."""
    chosen = quantisation.format_of(module, name)
    if chosen is None:
        return weight
    packed = pack(weight, chosen)
    packed.full = weight if quantisation.probe else None
    return packed
