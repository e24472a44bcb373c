"""Models to adapt: miniatures with weights, and full-size ones without."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from library.families.sd.refiner_adapters import REFINER_ADAPTERS
from library.families.sd.sd_adapters import SD_ADAPTERS
from library.families.sd.sdxl_adapters import SDXL_ADAPTERS
from networks import network
from networks.network import Network
from networks.settings import read_settings
from tests.tiny import diffusers_modules, unet_config

Model = dict[str, nn.Module]
PARTS = {"sd1": SD_ADAPTERS, "sd2": SD_ADAPTERS, "sdxl": SDXL_ADAPTERS, "refiner": REFINER_ADAPTERS}


def tiny(family: str = "sd1", dtype: torch.dtype = torch.float32) -> Model:
    """U-Net and text encoders of a miniature, frozen."""
    modules = diffusers_modules(family)
    model = {"unet": modules.unet, **modules.text_encoders}
    for module in model.values():
        # one by one: diffusers warns of .to(float64) on the whole
        for part in module.children():
            part.to(dtype)
        module.requires_grad_(False)
    return model


def small(family: str, dtype: torch.dtype = torch.float32) -> Model:
    """The same with one transformer block in each attention: a quarter of the layers of SDXL's miniature."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**unet_config(family) | {"transformer_layers_per_block": 1}).eval()
    model = {"unet": unet, **diffusers_modules(family).text_encoders}
    for module in model.values():
        for part in module.children():
            part.to(dtype)
        module.requires_grad_(False)
    return model


@cache
def full_size(family: str) -> Model:
    """U-Net and text encoders of SD1.5, SD2.1, SDXL or its refiner from the published configurations, on the meta
    device. Not to be changed."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    heads: dict[str, dict[str, Any]] = {
        "sd1": {"attention_head_dim": 8, "cross_attention_dim": 768},
        "sd2": {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
    }
    clip_l = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
    clip_h = CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=23)
    clip_g = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32, projection_dim=1280
    )
    with torch.device("meta"):
        if family in ("sdxl", "refiner"):
            model: Model = {"unet": UNet2DConditionModel(**_large(family))}
            if family == "sdxl":
                model["text_encoder"] = CLIPTextModel(clip_l)
            return model | {"text_encoder_2": CLIPTextModelWithProjection(clip_g)}
        unet = UNet2DConditionModel(sample_size=64, block_out_channels=(320, 640, 1280, 1280), **heads[family])
        return {"unet": unet, "text_encoder": CLIPTextModel(clip_h if family == "sd2" else clip_l)}


def _large(family: str) -> dict[str, Any]:
    """UNet2DConditionModel's arguments of stabilityai's stable-diffusion-xl-base-1.0 and -refiner-1.0."""
    refiner = family == "refiner"
    plain, attended = ("DownBlock2D", "UpBlock2D"), ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
    order = (plain, attended, attended, *([plain] if refiner else []))
    return {
        "sample_size": 128,
        "block_out_channels": (384, 768, 1536, 1536) if refiner else (320, 640, 1280),
        "down_block_types": tuple(down for down, _ in order),
        "up_block_types": tuple(up for _, up in reversed(order)),
        "transformer_layers_per_block": 4 if refiner else (1, 2, 10),
        "attention_head_dim": (6, 12, 24, 24) if refiner else (5, 10, 20),
        "cross_attention_dim": 1280 if refiner else 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2560 if refiner else 2816,
    }


class Transformer2DModel(nn.Module):
    """A toy under the name of the class that adapters look for: each kind of layer once."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(12, 16, 1)
        self.attn1 = nn.ModuleDict({"to_q": nn.Linear(16, 24, bias=False), "to_k": nn.Linear(16, 24)})
        self.ff = nn.ModuleDict({"net": nn.ModuleList([nn.Linear(24, 32), nn.Identity(), nn.Linear(32, 16)])})

    def forward(self, x: Tensor) -> Tensor:
        """(n, 12, h, w) -> (n, 16, h, w)."""
        flat = self.proj_in(x).flatten(2).mT
        hidden = torch.tanh(self.attn1["to_q"](flat)) * self.attn1["to_k"](flat)
        net: Any = self.ff["net"]
        return (flat + net[2](net[0](hidden).sigmoid())).mT.unflatten(2, x.shape[2:])


class ResnetBlock2D(nn.Module):
    """A toy with two kernels and a Linear between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(16, 12, 3, padding=1)
        self.time_emb_proj = nn.Linear(8, 12)
        self.conv2 = nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(n, 16, h, w) and (n, 8) -> (n, 16, h / 2, w / 2)."""
        return self.conv2(torch.tanh(self.conv1(x) + self.time_emb_proj(time)[:, :, None, None]))


class Toy(nn.Module):
    """A U-Net of 7 layers that takes no time."""

    def __init__(self) -> None:
        super().__init__()
        self.mid_block = nn.ModuleList([Transformer2DModel(), ResnetBlock2D()])

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(n, 12, h, w) and (n, 8) -> (n, 16, h / 2, w / 2)."""
        return self.mid_block[1](self.mid_block[0](x), time)


def toy(dtype: torch.dtype = torch.float32) -> Model:
    """The toy as a U-Net, frozen, with weights of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {"unet": Toy().to(dtype).requires_grad_(False)}


def toy_output(model: Model, dtype: torch.dtype | None = None) -> Tensor:
    """What the toy makes of fixed inputs, of its own dtype or another."""
    generator = torch.Generator().manual_seed(11)
    dtype = dtype or next(model["unet"].parameters()).dtype
    x = torch.randn(2, 12, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    out: Tensor = model["unet"](x, torch.randn(2, 8, generator=generator, dtype=torch.float64).to(dtype))
    return out


def outputs(model: Model, seed: int = 11) -> tuple[Tensor, Tensor]:
    """What the U-Net predicts and what the text encoders make of some tokens, for fixed inputs."""
    generator = torch.Generator().manual_seed(seed)
    unet: Any = model["unet"]
    dtype = unet.conv_in.weight.dtype
    width = unet.config.cross_attention_dim
    x = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    words = torch.randn(2, 5, width, generator=generator, dtype=torch.float64).to(dtype)
    tokens = torch.randint(1000, (2, 7), generator=generator)
    told = None
    if unet.config.addition_embed_type is not None:
        more = unet.config.projection_class_embeddings_input_dim % 256 or 128  # of the miniatures' pooled vector
        pooled = torch.randn(2, more, generator=generator, dtype=torch.float64).to(dtype)
        numbers = (unet.config.projection_class_embeddings_input_dim - more) // 256
        told = {"text_embeds": pooled, "time_ids": torch.full((2, numbers), 7.0, dtype=dtype)}
    texts = [module(tokens).last_hidden_state for name, module in model.items() if name != "unet"]
    return unet(x, torch.tensor([3, 700]), words, added_cond_kwargs=told).sample, torch.cat(texts, -1)


def create(
    model: Model,
    *arguments: str,
    module: str = "networks.lora",
    dim: int = 4,
    alpha: float = 3,
    family: str = "sd1",
    **more: Any,
) -> Network:
    """A new network of a seed, by --network_args."""
    parts = PARTS[family]
    settings, mistakes = read_settings(
        module, dim=dim, alpha=alpha, arguments=arguments, blocks=max(part.blocks for part in parts)
    )
    assert not mistakes
    return network.create(model, parts, settings, generator=torch.Generator().manual_seed(1), **more)


def trained(net: Network, size: float = 0.05) -> Network:
    """The network with random numbers added to all that it trains."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += (size * noise).to(parameter.dtype)
    return net
