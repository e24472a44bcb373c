"""Train the VAE of the example world: a small version of Stable Diffusion's architecture, on newly rendered images.

Loss: mean absolute error of the pixels and of their differences to the neighbours (for sharp edges), and a little
Kullback-Leibler divergence from the unit normal (Kingma and Welling 2013, arXiv 1312.6114), which keeps the latents
smooth.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import l1_loss, mse_loss

from examples.shapes.muon import Optimizers
from examples.shapes.world import Pixels, draw_scene, render

CONFIG: dict[str, Any] = {
    "block_out_channels": (32, 32, 64, 96),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 64,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
SCALING_FACTOR = 0.18215  # that of Stable Diffusion 1
KL_WEIGHT = 3e-4


def images(count: int, rng: random.Random) -> Tensor:
    """Random images of the world as pixels (count, 3, 64, 64) float32 in [-1, 1]."""
    return to_pixels([render(draw_scene(rng)) for _ in range(count)])


def to_pixels(images: Sequence[Pixels]) -> Tensor:
    """Images as (B, 3, 64, 64) float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def edges(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Differences to the right and to the lower neighbour."""
    return pixels[..., :, 1:] - pixels[..., :, :-1], pixels[..., 1:, :] - pixels[..., :-1, :]


def reconstruction_loss(output: Tensor, pixels: Tensor) -> Tensor:
    """The error of pixels and edges, a scalar."""
    loss = l1_loss(output, pixels) + 2 * mse_loss(output, pixels)
    for output_edges, target_edges in zip(edges(output), edges(pixels), strict=True):
        loss = loss + l1_loss(output_edges, target_edges)
    return loss


def train(steps: int, batch: int = 8, learning_rate: float = 2e-3, seed: int = 0) -> Any:
    """An AutoencoderKL after `steps` steps of AdamW, whose latents times SCALING_FACTOR have unit variance."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    rng = random.Random(seed)
    vae: Any = AutoencoderKL(**CONFIG)
    vae.quant_conv.bias.data[CONFIG["latent_channels"] :] = -4.0  # start with little noise
    optimizers = Optimizers([vae], muon_rate=learning_rate * 10, adam_rate=learning_rate, steps=steps)
    start = time.perf_counter()
    for step in range(steps):
        pixels = images(batch, rng)
        posterior = vae.encode(pixels).latent_dist
        output = vae.decode(posterior.sample()).sample
        loss = reconstruction_loss(output, pixels)
        divergence = (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean() / 2
        (loss + KL_WEIGHT * divergence).backward()
        optimizers.step()
        if step % 50 == 0 or step == steps - 1:
            error = l1_loss(output, pixels).item()
            print(
                f"autoencoder {step:5d}  loss {loss.item():.4f}  pixels {error:.4f}  divergence {divergence.item():.2f}"
                f"  {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    scale_latents(vae.eval(), images(512, rng))
    return vae


@torch.no_grad()
def scale_latents(vae: Any, pixels: Tensor) -> None:
    """Scale the latents to a standard deviation of 1 / SCALING_FACTOR; the reconstruction stays the same."""
    deviation = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(64)]).std()
    factor = 1 / (SCALING_FACTOR * deviation)
    channels = CONFIG["latent_channels"]
    vae.quant_conv.weight[:channels] *= factor
    vae.quant_conv.bias[:channels] *= factor
    vae.quant_conv.bias[channels:] += 2 * factor.log()  # the logarithm of the variance
    vae.post_quant_conv.weight /= factor


def save(vae: Any, folder: Path) -> None:
    """Write a diffusers VAE folder."""
    vae.save_pretrained(folder)


def load(folder: Path) -> Any:
    """The VAE of a folder, in evaluation mode."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder, local_files_only=True).eval()
