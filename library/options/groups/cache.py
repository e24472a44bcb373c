"""Options of the caches that are filled before training."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.flag import flag


@dataclass(frozen=True)
class CacheOptions:
    """Caches of latents and of text encoder outputs."""

    cache_latents: bool = flag(
        False,
        "Encode each image once before training and keep the latents in memory: faster, and the VAE leaves the device.",
        metadata="ss_cache_latents",
    )
    cache_latents_to_disk: bool = flag(
        False,
        "Keep the cached latents in files beside the images, for later runs too; includes cache_latents.",
        may_change_on_resume=True,
    )
    cache_format: str = flag(
        "safetensors",
        "File format of cache_latents_to_disk: safetensors, or npz as in sd-scripts.",
        choices=("safetensors", "npz"),
        may_change_on_resume=True,
    )
    vae_batch_size: int = flag(
        1,
        "Images per batch when latents are cached.",
        at_least=1,
        zero_is_off=True,
        may_change_on_resume=True,
    )
    skip_cache_check: bool = flag(
        False,
        "Use cached latents if their shape fits, without checking them against image and VAE.",
        may_change_on_resume=True,
    )
    cache_text_encoder_outputs: bool = flag(
        False, "Encode every possible caption once before training; the text encoder is then not trained."
    )
    cache_text_encoder_outputs_to_disk: bool = flag(
        False,
        "Keep the cached text encoder outputs in files, for later runs too; includes cache_text_encoder_outputs.",
        may_change_on_resume=True,
    )
