"""Where adapters sit in Stable Diffusion XL, under the names that kohya-style files have (sd-scripts networks/lora.py):
the U-Net's layers as in the original file (input_blocks_4_1_…), text encoders as transformers before 5. No torch."""

from __future__ import annotations

from functools import partial

from library.checkpoints.adapter_names import AdapterPart
from library.checkpoints.tables import unet_sd
from library.families.layer_names import UnetNames, text_layers
from library.families.sd_adapters import CONV_CONTAINERS, TEXT_CONTAINERS, TEXT_LEVEL, UNET_CONTAINERS

_NAMES = UnetNames(unet_sd.XL_ROWS, depths=(0, 2, 10), middle=10)
BLOCKS = _NAMES.blocks  # 23: 0 embeddings, 1 to 9 input, 10 to 12 middle, 13 to 21 output, 22 what comes out
OPENCLIP_LAYERS = 32


def unet_part(names: UnetNames) -> AdapterPart:
    """A U-Net under its original names, as adapters see it."""
    return AdapterPart(
        module="unet",
        group="unet",
        prefix="lora_unet",
        containers=UNET_CONTAINERS,
        conv_containers=CONV_CONTAINERS,
        rename=names.to_file,
        layers=names.layers,
        block=names.block,
        blocks=names.blocks,
    )


SDXL_ADAPTERS = (
    AdapterPart(
        module="text_encoder",
        group="text_encoder1",
        prefix="lora_te1",
        containers=TEXT_CONTAINERS,
        level=TEXT_LEVEL,
        layers=partial(text_layers, 12, TEXT_LEVEL),
    ),
    AdapterPart(  # transformers' class with a projection has the level itself
        module="text_encoder_2",
        group="text_encoder2",
        prefix="lora_te2",
        containers=TEXT_CONTAINERS,
        layers=partial(text_layers, OPENCLIP_LAYERS),
    ),
    unet_part(_NAMES),
)


def unet_block(path: str) -> int:
    """The block, 0 to 22, of a parameter of the U-Net by its path in diffusers' naming (--block_lr). ValueError for
    what is none."""
    return _NAMES.block_of(path)
