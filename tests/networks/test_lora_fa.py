"""LoRA-FA: down is drawn once and frozen (arXiv 2308.03303)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from networks import lora_fa
from networks.adapter import LayerSettings
from tests.networks import layers


@pytest.mark.parametrize(
    ("module", "channels"), [(nn.Linear(600, 32), 600), (nn.Conv2d(300, 32, 3), 300)], ids=["linear", "conv3"]
)
def test_down_is_drawn_as_kohya_draws_it(module: nn.Linear | nn.Conv2d, channels: int) -> None:
    """Normal, of variance 2 / (in + dim), where `in` is the number of channels whatever the kernel."""
    torch.manual_seed(1)
    down = lora_fa.create(layers.layer(module), LayerSettings(dim=40, alpha=1.0), module.weight).lora_down.weight
    assert float(down.std()) == pytest.approx(math.sqrt(2 / (channels + 40)), rel=0.03)
    assert float((down / down.std()).pow(4).mean()) == pytest.approx(3, rel=0.1), "normal, not uniform"


def test_down_is_never_trained() -> None:
    module = layers.base("linear", torch.float32)
    adapter = lora_fa.create(layers.layer(module), LayerSettings(dim=4, alpha=1.0), module.weight)
    loaded = lora_fa.load(layers.layer(module), layers.file_of(adapter))
    for one in (adapter, loaded):
        assert [key for key, value in one.named_parameters() if value.requires_grad] == ["lora_up.weight"]
    before = adapter.lora_down.weight.clone()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=0.5)
    x = layers.example(module)
    for _ in range(3):
        out = adapter.fused_forward(x, module.weight, module.bias, 1.0)
        assert out is not None
        out.square().sum().backward()
        optimizer.step()
    assert torch.equal(adapter.lora_down.weight, before) and adapter.lora_up.weight.any()
