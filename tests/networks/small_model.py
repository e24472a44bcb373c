"""A model in a few layers, one of each sort that adapters sit on, under the names of SD1's modules and classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Model = dict[str, nn.Module]


class Attention(nn.Module):
    """Linear layers under the names of diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(16, 16, bias=False), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.to_q(x) @ self.to_k(x).mT, -1) @ self.to_v(x)


class Transformer2DModel(nn.Module):
    """A 1x1 convolution, an attention and the second layer of a feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.proj_in = nn.LayerNorm(24), nn.Conv2d(24, 16, 1)
        second = nn.ModuleList([nn.Identity(), nn.Identity(), nn.Linear(16, 24)])
        block = nn.ModuleDict({"attn1": Attention(), "ff": nn.ModuleDict({"net": second})})
        self.transformer_blocks = nn.ModuleList([block])

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self.transformer_blocks[0]
        tokens = self.proj_in(self.norm(x.movedim(1, -1)).movedim(-1, 1)).flatten(2).mT
        return x + block.ff.net[2](torch.tanh(block.attn1(tokens))).mT.reshape(x.shape)


class ResnetBlock2D(nn.Module):
    """A 3x3 convolution and the Linear layer of a timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.time_emb_proj = nn.Conv2d(4, 24, 3, padding=1), nn.Linear(8, 24)
        self.norm1 = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.conv1(self.norm1(x)) + self.time_emb_proj(time)[..., None, None]


class Downsample2D(nn.Module):
    """A convolution with a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(24, 24, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Unet(nn.Module):
    """One of each of the layers that adapters sit on."""

    def __init__(self) -> None:
        super().__init__()
        names = {"resnets": ResnetBlock2D(), "downsamplers": Downsample2D(), "attentions": Transformer2DModel()}
        level = nn.ModuleDict({name: nn.ModuleList([module]) for name, module in names.items()})
        self.down_blocks = nn.ModuleList([level])

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        level: Any = self.down_blocks[0]
        return level.attentions[0](level.downsamplers[0](level.resnets[0](x, time)))


class CLIPMLP(nn.Module):
    """Two Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


def model() -> Model:
    """With random weights, always the same ones, in double precision."""
    torch.manual_seed(2)
    text_encoder = nn.Sequential()
    text_encoder.add_module("mlp", CLIPMLP())
    return {name: module.double() for name, module in {"unet": Unet(), "text_encoder": text_encoder}.items()}


def outputs(model: Model) -> tuple[Tensor, Tensor]:
    """What the U-Net and the text encoder make of an example, in the precision that they have."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(model["unet"].parameters()).dtype
    x, time = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 4, 8, 6), (2, 8)))
    text = model["text_encoder"](time.to(dtype))
    return model["unet"](x.to(dtype), text), text
