"""Where adapters sit in Stable Diffusion 1 and 2, under the names that kohya-style files have (sd-scripts,
networks/lora.py: diffusers' names for the U-Net, transformers' names before 5 for the text encoder). No torch."""

from __future__ import annotations

import re

from library.checkpoints.adapter_names import AdapterPart

BLOCKS = 25  # 0 unused, 1 to 11 down, 12 middle, 13 to 24 up
_LEVEL = re.compile(r"(down|up)_blocks\.(\d)\.(\w+?)\.(\d)")


def text_path(path: str) -> str:
    """A layer's path with the level that files have and transformers 5 has not."""
    return f"text_model.{path}"


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
        containers=frozenset({"CLIPAttention", "CLIPMLP"}),
        to_file=text_path,
    ),
    AdapterPart(
        module="unet",
        group="unet",
        prefix="lora_unet",
        containers=frozenset({"Transformer2DModel"}),
        conv_containers=frozenset({"ResnetBlock2D", "Downsample2D", "Upsample2D"}),
        block=unet_block,
        blocks=BLOCKS,
    ),
)
