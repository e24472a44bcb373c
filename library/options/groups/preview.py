"""Options of preview images, which are drawn during training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.options.flag import flag

SAMPLERS = (
    *(
        "ddim",
        "pndm",
        "lms",
        "euler",
        "euler_a",
        "heun",
        "dpm_2",
        "dpm_2_a",
        "dpmsolver",
        "dpmsolver++",
        "dpmsingle",
        "unipc",
    ),
    *("k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a"),
)


@dataclass(frozen=True)
class PreviewOptions:
    """Prompts, sampler, and when to draw."""

    may_change_on_resume: ClassVar[bool] = True

    sample_prompts: Path | None = flag(
        None, "File of prompts for preview images: .txt, .toml or .json; read again each time."
    )
    sample_every_n_steps: int | None = flag(
        None, "Draw preview images every n steps; 0 = off.", at_least=1, zero_is_off=True
    )
    sample_every_n_epochs: int | None = flag(
        None,
        "Draw preview images every n epochs; overrides sample_every_n_steps, 0 = off.",
        at_least=1,
        zero_is_off=True,
    )
    sample_at_first: bool = flag(False, "Draw preview images before the first step too.")
    sample_sampler: str = flag("ddim", "Sampler for prompts that name none.", choices=SAMPLERS)
    preview_refiner: str | None = flag(
        None,
        "Refiner of Stable Diffusion XL, a file or a diffusers folder, that also finishes each preview image of a base "
        "model, to a second file: it takes over for the last refiner_training_strength of the timesteps.",
        needs="hand_over",
        private=True,
    )
    validation_preview_steps: int | None = flag(
        None,
        "While a preview image is drawn, write the clean image that the model predicts so far, every n steps of the "
        "sampler, to sample/so_far; 0 = off.",
        at_least=1,
        zero_is_off=True,
    )
    preview_decoder: str | None = flag(
        None,
        "What decodes these pictures: a tiny autoencoder, a linear map from latents to colours that is fitted to the "
        "VAE, or the VAE itself; not set = tae with preview_tae, else linear.",
        choices=("tae", "linear", "vae"),
    )
    preview_tae: Path | None = flag(
        None, "Tiny autoencoder (TAESD) of the model's family: a diffusers folder, or a .safetensors file."
    )
    preview_target: str | None = flag(
        None,
        "Where these pictures go besides the folder: to the tracker, to webhooks, or to both; not set = nowhere else.",
        choices=("folder", "tensorboard", "webhook", "all"),
    )
    sample_batch_size: int = flag(
        1, "Number of prompts of the same size and sampler to draw together.", at_least=1, zero_is_off=True
    )
