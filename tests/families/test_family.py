"""Latents are scaled and shifted as diffusers' pipelines do it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from library.families.family import LatentSpace
from library.families.sd.sd import SD1

SCALE, SHIFT = 1.5305, 0.0609  # of Stable Diffusion 3's VAE


def latents() -> Tensor:
    return 3 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)) + 1


def scaled_by_diffusers(unscaled: Tensor) -> Tensor:
    """What the pipeline of Stable Diffusion 3 makes of an image whose latents are these, before it adds noise."""
    from diffusers import StableDiffusion3Img2ImgPipeline

    pipeline: Any = SimpleNamespace(
        vae=SimpleNamespace(
            config=SimpleNamespace(latent_channels=4, scaling_factor=SCALE, shift_factor=SHIFT),
            encode=lambda image: SimpleNamespace(latents=unscaled),
        ),
        scheduler=SimpleNamespace(scale_noise=lambda sample, timestep, noise: sample),
    )
    image, cpu = torch.zeros(1, 3, 64, 64), torch.device("cpu")
    prepare: Any = StableDiffusion3Img2ImgPipeline.prepare_latents
    found: Tensor = prepare(pipeline, image, None, 1, 1, torch.float32, cpu)
    return found


def test_latents_are_shifted_and_scaled_as_diffusers_does() -> None:
    ours = LatentSpace(channels=4, stride=8, scale=SCALE, cache_suffix="_x.npz", shift=SHIFT)
    assert torch.equal(ours.scaled(latents()), scaled_by_diffusers(latents()))
    # (2 - 0.0609) * 1.5305 = 2.96779255; the pipeline decodes latents / scaling_factor + shift_factor
    assert torch.allclose(ours.scaled(torch.tensor(2.0)), torch.tensor(2.96779255))
    assert torch.allclose(ours.unscaled(torch.tensor(2.96779255)), torch.tensor(2.0))
    assert torch.allclose(ours.unscaled(ours.scaled(latents())), latents(), atol=1e-6)


def test_without_a_shift_nothing_is_added() -> None:
    """Not even a zero, which would make +0 of -0."""
    assert torch.equal(SD1.latent.scaled(latents()), latents() * 0.18215)
    assert torch.equal(SD1.latent.unscaled(latents()), latents() / 0.18215)
    assert SD1.latent.unscaled(torch.tensor(-0.0)).signbit()
