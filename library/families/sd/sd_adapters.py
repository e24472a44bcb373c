"""Where adapters sit in Stable Diffusion 1 and 2, under the names that kohya-style files have (sd-scripts,
networks/lora.py: diffusers' names for the U-Net, transformers' names before 5 for the text encoder). No torch."""

from __future__ import annotations

import re
from functools import partial

from library.checkpoints.adapter_names import AdapterPart
from library.checkpoints.tables import unet_sd
from library.families.sd.layer_names import UnetNames, text_layers

TEXT_LEVEL = "text_model."  # files have it, transformers 5 has not
TEXT_CONTAINERS = frozenset({"CLIPAttention", "CLIPMLP"})
UNET_CONTAINERS = frozenset({"Transformer2DModel"})
CONV_CONTAINERS = frozenset({"ResnetBlock2D", "Downsample2D", "Upsample2D"})
BLOCKS = 25  # 0 unused, 1 to 11 down, 12 middle, 13 to 24 up
_LEVEL = re.compile(r"(down|up)_blocks\.(\d)\.(\w+?)\.(\d)")


def unet_block(path: str) -> int:
    """The block of a layer of the U-Net by its path in diffusers' naming. ValueError outside of all blocks."""
    if path.startswith("mid_block."):
        return 12
    found = _LEVEL.match(path)
    if found is None:
        raise ValueError(f"{path} lies in no block")
    side, level, kind, index = found[1], int(found[2]), found[3], int(found[4])
    place = 3 * level + (2 if kind in ("downsamplers", "upsamplers") else index)
    return (1 if side == "down" else 13) + place


SD_ADAPTERS = (
    AdapterPart(
        module="text_encoder",
        group="text_encoder1",
        prefix="lora_te",
        containers=TEXT_CONTAINERS,
        level=TEXT_LEVEL,
        layers=partial(text_layers, 24, TEXT_LEVEL),  # SD1 has 12, SD2 one less than its files
    ),
    AdapterPart(
        module="unet",
        group="unet",
        prefix="lora_unet",
        containers=UNET_CONTAINERS,
        conv_containers=CONV_CONTAINERS,
        layers=UnetNames(unet_sd.ROWS, depths=(1, 1, 1, 0), middle=1).layers,
        block=unet_block,
        blocks=BLOCKS,
    ),
)
