"""What is computed once before training and kept."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.flag import flag


@dataclass(frozen=True)
class CacheOptions:
    """Latents of images, and the text encoder's outputs."""

    cache_latents: bool = flag(
        False,
        "Encode every image once before training and keep the result in memory: faster, and the VAE leaves the device.",
        metadata="ss_cache_latents",
    )
    cache_latents_to_disk: bool = flag(
        False,
        "Keep the encoded images in files beside the images, for later runs too. Includes cache_latents.",
        may_change_on_resume=True,
    )
    cache_format: str = flag(
        "safetensors",
        "Files of cache_latents_to_disk: safetensors, or npz as kohya's sd-scripts write and read them.",
        choices=("safetensors", "npz"),
        may_change_on_resume=True,
    )
    vae_batch_size: int = flag(
        1,
        "Images that are encoded together when latents are cached.",
        at_least=1,
        zero_is_off=True,
        may_change_on_resume=True,
    )
    skip_cache_check: bool = flag(
        False,
        "Take cached latents as they are if their shape fits, without comparing them with image and VAE.",
        may_change_on_resume=True,
    )
    cache_text_encoder_outputs: bool = flag(
        False, "Encode every caption that can occur once before training; the text encoder is then not trained."
    )
    cache_text_encoder_outputs_to_disk: bool = flag(
        False,
        "Keep the encoded captions in files, for later runs too. Includes cache_text_encoder_outputs.",
        may_change_on_resume=True,
    )
