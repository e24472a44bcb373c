"""Quantise the weights of a base model one by one: while it is loaded, or afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from library.runtime.stored_weights import compute_in_fp32
from library.training.quantised.backends import Arena, make_arena, pack

if TYPE_CHECKING:
    from library.families.family import Model
    from library.training.quantised.plan import Quantisation


@dataclass
class Packer:
    """What loading calls for each weight (family.Pack), so that the full model is never in memory."""

    quantisation: Quantisation
    arenas: dict[str, Arena] = field(default_factory=dict)

    def __call__(self, module: str, name: str, weight: Tensor) -> Tensor:
        """The weight in its format, or unchanged if it has none; with a probe it keeps the full one too."""
        chosen = self.quantisation.format_of(module, name)
        if chosen is None:
            return weight
        if module not in self.arenas:
            shapes = self.quantisation.modules[module].weights.values()
            self.arenas[module] = make_arena(chosen, shapes, weight.device)
        packed = pack(weight, chosen, self.arenas[module])
        packed.full = weight if self.quantisation.probe else None
        return packed


def quantise(model: Model, quantisation: Quantisation) -> None:
    """Quantise a model that has been loaded in full, for adapters to be merged into it."""
    packer, modules = Packer(quantisation), model.modules()
    for module_name in quantisation.modules:
        module = modules[module_name]
        for layer_name, layer in module.named_modules():
            weight = getattr(layer, "weight", None)
            if isinstance(weight, nn.Parameter):
                packed = packer(module_name, f"{layer_name}.weight", weight.detach())
                layer.weight = nn.Parameter(packed, requires_grad=False)
        compute_in_fp32(module)
