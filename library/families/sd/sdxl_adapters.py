"""Modules of Stable Diffusion XL that adapters apply to, with the names of sd-scripts (networks/lora.py): U-Net layers
as in original files (input_blocks_4_1_…), text encoders as in transformers before 5. No torch."""

from __future__ import annotations

from functools import partial

from library.checkpoints.adapter_key_names import AdapterPart
from library.checkpoints.tables import unet_sd
from library.families.sd.layer_names import UnetNames, text_layers
from library.families.sd.sd_adapters import (
    CONV_CONTAINERS,
    CONV_SEGMENTS,
    TEXT_CONTAINERS,
    TEXT_LEVEL,
    TEXT_SEGMENTS,
    UNET_CONTAINERS,
    UNET_SEGMENTS,
)

# its 23 blocks: 0 embeddings, 1 to 9 input, 10 to 12 middle, 13 to 21 output, 22 output layers
NAMES = UnetNames(unet_sd.XL_ROWS, depths=(0, 2, 10), middle=10)
_OPENCLIP_LAYERS = 32


def unet_part(names: UnetNames) -> AdapterPart:
    """Return the adapter part of a U-Net, named as in original files."""
    return AdapterPart(
        module="unet",
        group="unet",
        prefix="lora_unet",
        containers=UNET_CONTAINERS,
        conv_containers=CONV_CONTAINERS,
        segments=UNET_SEGMENTS,
        conv_segments=CONV_SEGMENTS,
        rename=names.to_file,
        layers=names.layers,
        block=names.block,
        blocks=names.blocks,
    )


def openclip_part(group: str, prefix: str) -> AdapterPart:
    """Return the adapter part of OpenCLIP's text encoder; CLIPTextModelWithProjection has the `text_model.` level."""
    return AdapterPart(
        module="text_encoder_2",
        group=group,
        prefix=prefix,
        containers=TEXT_CONTAINERS,
        segments=TEXT_SEGMENTS,
        layers=partial(text_layers, _OPENCLIP_LAYERS),
    )


SDXL_ADAPTERS = (
    AdapterPart(
        module="text_encoder",
        group="text_encoder1",
        prefix="lora_te1",
        containers=TEXT_CONTAINERS,
        segments=TEXT_SEGMENTS,
        level=TEXT_LEVEL,
        layers=partial(text_layers, 12, TEXT_LEVEL),
    ),
    openclip_part("text_encoder2", "lora_te2"),
    unet_part(NAMES),
)
