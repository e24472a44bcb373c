"""LoRA-FA: a LoRA whose down stays as it was drawn, so that only up is trained and its input, of `dim` numbers, is all
that has to be kept for the gradients (arXiv 2308.03303, section 3). Files are those of a LoRA.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from networks import lora
from networks.adapter import Layer, LayerSettings


def create(layer: Layer, settings: LayerSettings, weight: Tensor) -> lora.Lora:
    """down drawn from a normal distribution with variance 2 / (in + dim), as kohya draws it, and frozen; up = 0."""
    adapter = _frozen(lora.create(layer, settings, weight))
    nn.init.normal_(adapter.lora_down.weight, std=math.sqrt(2 / (layer.shape[1] * layer.groups + settings.dim)))
    return adapter


def load(layer: Layer, tensors: dict[str, Tensor]) -> lora.Lora:
    """The LoRA of a file, its down frozen. AdapterError as lora.load."""
    return _frozen(lora.load(layer, tensors))


def _frozen(adapter: lora.Lora) -> lora.Lora:
    adapter.lora_down.weight.requires_grad = False
    return adapter
