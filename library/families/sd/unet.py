"""The U-Net of Stable Diffusion: its configuration from tensor shapes, its module, and its prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.families.sd.shapes import Shapes, count_blocks

if TYPE_CHECKING:
    from torch import Tensor, nn

    from library.families.family import Conditioning

ID_WIDTH = 256  # of the sinusoidal embedding of each size or score in SDXL's U-Net


def unet_config(shapes: Shapes, *, heads: int | None, head_size: int | None, ids: int = 0) -> dict[str, Any]:
    """Return UNet2DConditionModel's arguments from the shapes of a U-Net under diffusers' names.

    Shapes do not show the number of heads: `heads` at every level (SD1), otherwise width / `head_size` (SD2, SDXL).
    `ids`: number of sizes and scores it is conditioned on. Raises KeyError for a missing tensor.
    """
    levels = range(count_blocks(shapes, "down_blocks."))
    widths = [shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in levels]
    attends = [f"down_blocks.{level}.attentions.0.proj_in.weight" in shapes for level in levels]
    first = f"down_blocks.{attends.index(True)}.attentions.0"
    middle = count_blocks(shapes, "mid_block.attentions.0.transformer_blocks.")
    depths = [count_blocks(shapes, f"down_blocks.{level}.attentions.0.transformer_blocks.") for level in levels]
    depths[-1] = depths[-1] or middle  # diffusers reads the middle's depth there
    attention_depths = [depth for depth in depths if depth]
    return {
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": count_blocks(shapes, "down_blocks.0.resnets."),
        "down_block_types": ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        "cross_attention_dim": shapes[f"{first}.transformer_blocks.0.attn2.to_k.weight"][1],
        "transformer_layers_per_block": (
            attention_depths[0] if len(set(attention_depths)) == 1 else [depth or 1 for depth in depths]
        ),
        "use_linear_projection": len(shapes[f"{first}.proj_in.weight"]) == 2,
        # the number of heads, despite diffusers' historical name
        "attention_head_dim": heads if heads is not None else [width // (head_size or width) for width in widths],
        "norm_num_groups": 32,
        **(_additional_inputs(shapes) if ids else {}),
    }


def _additional_inputs(shapes: Shapes) -> dict[str, Any]:
    """Arguments of a U-Net that is conditioned on sizes and a pooled text vector."""
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": ID_WIDTH,
        "projection_class_embeddings_input_dim": shapes["add_embedding.linear_1.weight"][1],
    }


def make_unet(config: Mapping[str, Any]) -> nn.Module:
    """Make diffusers' UNet2DConditionModel."""
    from diffusers import UNet2DConditionModel

    make: Any = UNet2DConditionModel  # its decorators hide its type
    module: nn.Module = make(**config)
    return module


def predict(backbone: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """Run the U-Net on latents (B, C, h, w) at `timesteps` (B,), conditioned on "states" (B, L, width)."""
    output: Tensor = backbone(noisy, timesteps, encoder_hidden_states=conditioning["states"], return_dict=False)[0]
    return output


def predict_with_ids(
    backbone: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, ids: Tensor
) -> Tensor:
    """Run a U-Net that is also conditioned on the pooled text and on `ids` (B, n) float32.

    The ids stay float32 until they are embedded: bfloat16 has no number between 1024 and 1032.
    """
    output: Tensor = backbone(
        noisy,
        timesteps,
        encoder_hidden_states=conditioning["states"],
        added_cond_kwargs={"text_embeds": conditioning["pooled"], "time_ids": ids.float()},
        return_dict=False,
    )[0]
    return output
