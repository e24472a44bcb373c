"""The U-Net of Stable Diffusion 1 and 2: its configuration read from shapes, its module, and its prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.families.shapes import Shapes, count_blocks

if TYPE_CHECKING:
    from torch import Tensor, nn


def unet_config(shapes: Shapes, *, heads: int | None, head_size: int | None) -> dict[str, Any]:
    """UNet2DConditionModel's arguments from the shapes of a U-Net under diffusers' names.

    Heads are not to be seen in the tensors: `heads` at every level (SD1), else width / `head_size` (SD2).
    Raises KeyError for a missing tensor.
    """
    levels = range(count_blocks(shapes, "down_blocks."))
    widths = [shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in levels]
    attends = [f"down_blocks.{level}.attentions.0.proj_in.weight" in shapes for level in levels]
    first = f"down_blocks.{attends.index(True)}.attentions.0"
    depths = [count_blocks(shapes, f"down_blocks.{level}.attentions.0.transformer_blocks.") or 1 for level in levels]
    return {
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": count_blocks(shapes, "down_blocks.0.resnets."),
        "down_block_types": ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        "cross_attention_dim": shapes[f"{first}.transformer_blocks.0.attn2.to_k.weight"][1],
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
        "use_linear_projection": len(shapes[f"{first}.proj_in.weight"]) == 2,
        # diffusers' name is historical: what it holds is the number of heads
        "attention_head_dim": heads if heads is not None else [width // (head_size or width) for width in widths],
        "norm_num_groups": 32,
    }


def make_unet(config: Mapping[str, Any]) -> nn.Module:
    """diffusers' UNet2DConditionModel, without weights if made on the meta device."""
    from diffusers import UNet2DConditionModel

    make: Any = UNet2DConditionModel  # its decorators hide its type
    module: nn.Module = make(**config)
    return module


def predict(unet: Any, noisy: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
    """The U-Net's output (B, C, h, w) for latents at `timesteps` (B,) under text states `context` (B, L, width)."""
    output: Tensor = unet(noisy, timesteps, encoder_hidden_states=context, return_dict=False)[0]
    return output
