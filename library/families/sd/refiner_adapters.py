"""Modules of SDXL's refiner that adapters apply to. sd-scripts has no names for them: these are SDXL's, with the prefix
of a model's only text encoder, as ComfyUI reads them. No torch."""

from __future__ import annotations

from library.checkpoints.tables import unet_sd
from library.families.sd.layer_names import UnetNames
from library.families.sd.sdxl_adapters import openclip_part, unet_part

# its 29 blocks: 0 embeddings, 1 to 12 input, 13 to 15 middle, 16 to 27 output, 28 output layers
NAMES = UnetNames(unet_sd.XL_ROWS, depths=(0, 4, 4, 0), middle=4)

REFINER_ADAPTERS = (openclip_part("text_encoder1", "lora_te"), unet_part(NAMES))
