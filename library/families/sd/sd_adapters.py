"""Modules of Stable Diffusion 1 and 2 that adapters apply to, with the names of sd-scripts (networks/lora.py): those of
diffusers for the U-Net, of transformers before 5 for the text encoder. No torch."""

from __future__ import annotations

import re
from functools import partial

from library.checkpoints.adapter_key_names import AdapterPart
from library.checkpoints.tables import unet_sd
from library.families.sd.layer_names import UnetNames, text_layers

TEXT_LEVEL = "text_model."  # in files, but not in transformers 5
TEXT_CONTAINERS = frozenset({"CLIPAttention", "CLIPMLP"})
UNET_CONTAINERS = frozenset({"Transformer2DModel"})
CONV_CONTAINERS = frozenset({"ResnetBlock2D", "Downsample2D", "Upsample2D"})
# the same by the names of such modules in paths
TEXT_SEGMENTS = frozenset({"self_attn", "mlp"})
UNET_SEGMENTS = frozenset({"attentions"})
CONV_SEGMENTS = frozenset({"resnets", "downsamplers", "upsamplers"})
BLOCKS = 25  # 0 unused, 1 to 11 down, 12 middle, 13 to 24 up
_LEVEL = re.compile(r"(down|up)_blocks\.(\d)\.(\w+?)\.(\d)")


def unet_block(path: str) -> int:
    """Return the block of a U-Net layer by its path in diffusers' naming. Raises ValueError outside all blocks."""
    if path.startswith("mid_block."):
        return 12
    found = _LEVEL.match(path)
    if found is None:
        raise ValueError(f"{path} is in no block")
    side, level, kind, index = found[1], int(found[2]), found[3], int(found[4])
    place = 3 * level + (2 if kind in ("downsamplers", "upsamplers") else index)
    return (1 if side == "down" else 13) + place


_NAMES = UnetNames(unet_sd.ROWS, depths=(1, 1, 1, 0), middle=1)

SD_ADAPTERS = (
    AdapterPart(
        module="text_encoder",
        group="text_encoder1",
        prefix="lora_te",
        containers=TEXT_CONTAINERS,
        segments=TEXT_SEGMENTS,
        level=TEXT_LEVEL,
        layers=partial(text_layers, 24, TEXT_LEVEL),  # SD1 has 12, SD2 23, one less than its files
    ),
    AdapterPart(
        module="unet",
        group="unet",
        prefix="lora_unet",
        containers=UNET_CONTAINERS,
        conv_containers=CONV_CONTAINERS,
        segments=UNET_SEGMENTS,
        conv_segments=CONV_SEGMENTS,
        original=_NAMES.to_file,
        layers=_NAMES.layers,
        block=unet_block,
        blocks=BLOCKS,
    ),
)
