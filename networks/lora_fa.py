"""LoRA-FA: a LoRA with a frozen random down. Only up is trained, so that only its input, of `dim` values, is kept for
the backward pass (arXiv 2308.03303, section 3). Files are those of a LoRA.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from networks import lora
from networks.adapter import Layer, LayerSettings


def create(layer: Layer, settings: LayerSettings, weight: Tensor) -> lora.Lora:
    """Create a LoRA-FA: down is normal with variance 2 / (in + dim) as in kohya's, and frozen; up = 0."""
    adapter = _freeze_down(lora.create(layer, settings, weight))
    nn.init.normal_(adapter.lora_down.weight, std=math.sqrt(2 / (layer.shape[1] * layer.groups + settings.dim)))
    return adapter


def load(layer: Layer, tensors: dict[str, Tensor]) -> lora.Lora:
    """Load the tensors of a LoRA and freeze down. AdapterError as lora.load."""
    return _freeze_down(lora.load(layer, tensors))


def _freeze_down(adapter: lora.Lora) -> lora.Lora:
    adapter.lora_down.weight.requires_grad = False
    return adapter
