"""Where adapters sit in the refiner of Stable Diffusion XL. sd-scripts has no names for it: these are SDXL's, with the
prefix of the text encoder that a model with a single one has (so ComfyUI reads them). No torch."""

from __future__ import annotations

from functools import partial

from library.checkpoints.adapter_names import AdapterPart
from library.checkpoints.tables import unet_sd
from library.families.layer_names import UnetNames, text_layers
from library.families.sd_adapters import TEXT_CONTAINERS
from library.families.sdxl_adapters import OPENCLIP_LAYERS, unet_part

_NAMES = UnetNames(unet_sd.XL_ROWS, depths=(0, 4, 4, 0), middle=4)
BLOCKS = _NAMES.blocks  # 29: 0 embeddings, 1 to 12 input, 13 to 15 middle, 16 to 27 output, 28 what comes out

REFINER_ADAPTERS = (
    AdapterPart(
        module="text_encoder_2",
        group="text_encoder1",
        prefix="lora_te",
        containers=TEXT_CONTAINERS,
        layers=partial(text_layers, OPENCLIP_LAYERS),
    ),
    unet_part(_NAMES),
)


def unet_block(path: str) -> int:
    """The block, 0 to 28, of a parameter of the U-Net by its path in diffusers' naming (--block_lr). ValueError for
    what is none."""
    return _NAMES.block_of(path)
