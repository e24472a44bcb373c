"""The VAE of Stable Diffusion: its configuration from tensor shapes, its module, encoding and decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from library.families.sd.shapes import Shapes, count_blocks

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def vae_config(shapes: Shapes, scale: float) -> dict[str, Any]:
    """Return AutoencoderKL's arguments from shapes under diffusers' names. Raises KeyError for a missing tensor."""
    levels = range(count_blocks(shapes, "encoder.down_blocks."))
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["post_quant_conv.weight"][0],
        "block_out_channels": [shapes[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"][0] for level in levels],
        "layers_per_block": count_blocks(shapes, "encoder.down_blocks.0.resnets."),
        "down_block_types": ["DownEncoderBlock2D" for _ in levels],
        "up_block_types": ["UpDecoderBlock2D" for _ in levels],
        "norm_num_groups": 32,
        "scaling_factor": scale,
    }


def make_vae(config: Mapping[str, Any]) -> nn.Module:
    """Make diffusers' AutoencoderKL."""
    from diffusers import AutoencoderKL

    make: Any = AutoencoderKL  # its decorators hide its type
    module: nn.Module = make(**config)
    return module


def encode_images(vae: Any, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Sample the posterior of pixels (B, 3, H, W) in [-1, 1]: unscaled latents (B, C, h, w) float32.

    Each sample's noise is drawn on the CPU from its own generator, so it depends on neither batch nor device. Runs in
    the dtype and on the device of the VAE. Raises ValueError unless there are B generators.
    """
    import torch

    from library.runtime.transfers import upload

    if len(generators) != len(pixels):
        raise ValueError(f"{len(pixels)} images need as many generators, not {len(generators)}")
    with torch.no_grad():
        posterior = vae.encode(upload(pixels, vae.device).to(vae.dtype)).latent_dist
    mean: Tensor = posterior.mean.float()
    deviation: Tensor = posterior.std.float()
    noise = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in generators])
    return mean + deviation * upload(noise, mean.device)


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Decode unscaled latents (B, C, h, w) to pixels (B, 3, H, W) float32 in about [-1, 1]."""
    import torch

    with torch.no_grad():
        images: Tensor = vae.decode(latents.to(device=vae.device, dtype=vae.dtype), return_dict=False)[0]
    return images.float()
