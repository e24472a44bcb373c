"""Published VAE files, by SHA-256: their shapes are those of all VAEs of Stable Diffusion, and nothing in most of them
says which model they are for.

Files of huggingface.co: stabilityai (sdxl-vae, stable-diffusion-xl-base-1.0, sd-vae-ft-mse, sd-vae-ft-ema and their
-original repositories), madebyollin/sdxl-vae-fp16-fix, stable-diffusion-v1-5/stable-diffusion-v1-5 and
hakurei/waifu-diffusion-v1-4. A row is only added with a public source that names this file beside this SHA-256.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

VaeKind = Literal["sd", "sdxl"]

VAES: Mapping[str, VaeKind] = {
    "63aeecb90ff7bc1c115395962d3e803571385b61938377bc7089b36e81e92e2e": "sdxl",  # sdxl_vae.safetensors
    "235745af8d86bf4a4c1b5b4f529868b37019a10f7c0b2e79ad0abca3a22bc6e1": "sdxl",  # fp16 fix, sdxl_vae.safetensors
    "1b909373b28f2137098b0fd9dbc6f97f8410854f31f84ddc9fa04b077b0ace2c": "sdxl",  # fp16 fix, diffusers
    "1598f3d24932bcfe6634e8b618ea1e30ab1d57f5aad13a6d2de446d2199f2341": "sdxl",  # of SDXL, diffusers
    "bcb60880a46b63dea58e9bc591abe15f8350bde47b405f9c38f4be70c6161e68": "sdxl",  # of SDXL, diffusers, fp16
    "735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75": "sd",  # vae-ft-mse-840000-ema-pruned
    "c6a580b13a5bc05a5e16e4dbb80608ff2ec251a162311590c1f34c013d7f3dab": "sd",  # vae-ft-mse-840000-ema-pruned.ckpt
    "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815": "sd",  # sd-vae-ft-mse, diffusers
    "0b204ad0cae549e0a7e298d803d57e36363760dec71c63109c1da3e1147ec520": "sd",  # vae-ft-ema-560000-ema-pruned.ckpt
    "32db726da04f06c1b6b14c0043ce115cc87a501482945c5add89a40d838fcb46": "sd",  # sd-vae-ft-ema, diffusers
    "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c": "sd",  # of SD 1.5, diffusers
    "4fbcf0ebe55a0984f5a5e00d8c4521d52359af7229bb4d81890039d2aa16dd7c": "sd",  # of SD 1.5, diffusers, fp16
    "df3c506e51b7ee1d7b5a6a2bb7142d47d488743c96aa778afb0f53a2cdc2d38d": "sd",  # kl-f8-anime2.ckpt
    "2f11c4a99ddc28d0ad8bce0acc38bed310b45d38a3fe4bb367dc30f3ef1a4868": "sd",  # kl-f8-anime.ckpt
}

# bytes: 83.65 million values in fp16 are 167 MB, in float32 335 MB; kl-f8-anime2.ckpt has 405 MB
SMALLEST, LARGEST = 160_000_000, 420_000_000
