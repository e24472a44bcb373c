"""Layers of the base model in a few numbers, and what an adapter makes of one: for tests of single adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from networks.adapter import Layer

# Names as files have them; the sizes have divisors for blocks and Kronecker factors, and none is like another.
NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k"  # every kind can sit there
SHAPES = ("linear", "conv1", "conv3", "strided")


def base(shape: str, dtype: torch.dtype = torch.float64) -> nn.Linear | nn.Conv2d:
    """A frozen layer with random weights."""
    module: nn.Linear | nn.Conv2d
    if shape == "linear":
        module = nn.Linear(24, 40)
    elif shape == "conv1":
        module = nn.Conv2d(16, 24, 1)
    elif shape == "conv3":
        module = nn.Conv2d(24, 16, 3, padding=1)
    else:
        module = nn.Conv2d(16, 24, 3, stride=2, padding=2, dilation=2)
    return module.to(dtype).requires_grad_(False)


def layer(module: nn.Linear | nn.Conv2d, name: str = NAME) -> Layer:
    """What an adapter is told of it."""
    if isinstance(module, nn.Linear):
        return Layer(name, tuple(module.weight.shape))
    return Layer(
        name,
        tuple(module.weight.shape),
        stride=module.stride,  # type: ignore[arg-type]
        padding=module.padding,  # type: ignore[arg-type]
        dilation=module.dilation,  # type: ignore[arg-type]
        groups=module.groups,
    )


def example(module: nn.Linear | nn.Conv2d) -> Tensor:
    """An input of two samples."""
    size = (2, 5, module.in_features) if isinstance(module, nn.Linear) else (2, module.in_channels, 9, 7)
    return torch.randn(size, dtype=module.weight.dtype)


def changed(module: nn.Linear | nn.Conv2d, x: Tensor, delta: Tensor) -> Tensor:
    """The layer's output for x with ΔW added to its weight."""
    weight = module.weight + delta
    if isinstance(module, nn.Linear):
        return functional.linear(x, weight, module.bias)
    return functional.conv2d(x, weight, module.bias, module.stride, module.padding, module.dilation, module.groups)


def nudge(adapter: nn.Module, size: float = 0.3) -> Any:
    """The adapter with random numbers added to all that it trains, as if it had been trained."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn_like(parameter)
    return adapter


def file_of(adapter: nn.Module) -> dict[str, Tensor]:
    """What a file holds of the layer."""
    return {key: value.detach().clone() for key, value in adapter.state_dict().items()}
