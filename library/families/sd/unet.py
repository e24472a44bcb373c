"""The U-Net of Stable Diffusion: its configuration read from shapes, its module, and its prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.families.sd.shapes import Shapes, count_blocks

if TYPE_CHECKING:
    from torch import Tensor, nn

    from library.families.family import Conditioning

ID_WIDTH = 256  # of the sinusoidal embedding of each number that SDXL's U-Net is told


def unet_config(shapes: Shapes, *, heads: int | None, head_size: int | None, ids: int = 0) -> dict[str, Any]:
    """UNet2DConditionModel's arguments from the shapes of a U-Net under diffusers' names.

    Heads are not to be seen in the tensors: `heads` at every level (SD1), else width / `head_size` (SD2, SDXL).
    `ids`: how many numbers it is told beside text and timestep. Raises KeyError for a missing tensor.
    """
    levels = range(count_blocks(shapes, "down_blocks."))
    widths = [shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in levels]
    attends = [f"down_blocks.{level}.attentions.0.proj_in.weight" in shapes for level in levels]
    first = f"down_blocks.{attends.index(True)}.attentions.0"
    middle = count_blocks(shapes, "mid_block.attentions.0.transformer_blocks.")
    depths = [count_blocks(shapes, f"down_blocks.{level}.attentions.0.transformer_blocks.") for level in levels]
    depths[-1] = depths[-1] or middle  # diffusers reads the middle's depth there
    told = [depth for depth in depths if depth]
    return {
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": count_blocks(shapes, "down_blocks.0.resnets."),
        "down_block_types": ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        "cross_attention_dim": shapes[f"{first}.transformer_blocks.0.attn2.to_k.weight"][1],
        "transformer_layers_per_block": told[0] if len(set(told)) == 1 else [depth or 1 for depth in depths],
        "use_linear_projection": len(shapes[f"{first}.proj_in.weight"]) == 2,
        # diffusers' name is historical: what it holds is the number of heads
        "attention_head_dim": heads if heads is not None else [width // (head_size or width) for width in widths],
        "norm_num_groups": 32,
        **(_told_sizes(shapes) if ids else {}),
    }


def _told_sizes(shapes: Shapes) -> dict[str, Any]:
    """The arguments of a U-Net that is told sizes and a pooled text vector."""
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": ID_WIDTH,
        "projection_class_embeddings_input_dim": shapes["add_embedding.linear_1.weight"][1],
    }


def make_unet(config: Mapping[str, Any]) -> nn.Module:
    """diffusers' UNet2DConditionModel, without weights if made on the meta device."""
    from diffusers import UNet2DConditionModel

    make: Any = UNet2DConditionModel  # its decorators hide its type
    module: nn.Module = make(**config)
    return module


def predict(backbone: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """The U-Net's output (B, C, h, w) for latents at `timesteps` (B,) under the text's states (B, L, width)."""
    output: Tensor = backbone(noisy, timesteps, encoder_hidden_states=conditioning["states"], return_dict=False)[0]
    return output


def predict_with_ids(
    backbone: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, ids: Tensor
) -> Tensor:
    """As `predict`, for a U-Net that is told the pooled text too, and `ids` (B, n) float32.

    The ids stay float32 until they are embedded: bfloat16 knows no number between 1024 and 1032.
    """
    output: Tensor = backbone(
        noisy,
        timesteps,
        encoder_hidden_states=conditioning["states"],
        added_cond_kwargs={"text_embeds": conditioning["pooled"], "time_ids": ids.float()},
        return_dict=False,
    )[0]
    return output
