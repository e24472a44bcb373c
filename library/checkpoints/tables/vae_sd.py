"""VAE of Stable Diffusion: diffusers' module names | names in original files (without `first_stage_model.`).

Letters: i level, j residual block on the way down, k on the way up; t = number of levels. The decoder counts its levels
backwards. Source: CompVis/stable-diffusion ldm/modules/diffusionmodules/model.py and diffusers' AutoencoderKL.
"""

from __future__ import annotations

from library.checkpoints.keymap import Row, within

_RESNET = (
    Row("norm1", "norm1"),
    Row("conv1", "conv1"),
    Row("norm2", "norm2"),
    Row("conv2", "conv2"),
    Row("conv_shortcut", "nin_shortcut"),
)
_ATTENTION = (
    Row("group_norm", "norm"),
    Row("to_q", "q", "conv 1x1"),
    Row("to_k", "k", "conv 1x1"),
    Row("to_v", "v", "conv 1x1"),
    Row("to_out.0", "proj_out", "conv 1x1"),
)


def _both(side: str) -> tuple[Row, ...]:
    """Rows that the encoder and the decoder share."""
    return (
        Row(f"{side}.conv_in", f"{side}.conv_in"),
        *within(f"{side}.mid_block.resnets.0", f"{side}.mid.block_1", _RESNET),
        *within(f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", _ATTENTION),
        *within(f"{side}.mid_block.resnets.1", f"{side}.mid.block_2", _RESNET),
        Row(f"{side}.conv_norm_out", f"{side}.norm_out"),
        Row(f"{side}.conv_out", f"{side}.conv_out"),
    )


ROWS: tuple[Row, ...] = (
    *_both("encoder"),
    *within("encoder.down_blocks.{i}.resnets.{j}", "encoder.down.{i}.block.{j}", _RESNET),
    Row("encoder.down_blocks.{i}.downsamplers.0.conv", "encoder.down.{i}.downsample.conv"),
    *_both("decoder"),
    *within("decoder.up_blocks.{i}.resnets.{k}", "decoder.up.{t-i-1}.block.{k}", _RESNET),
    Row("decoder.up_blocks.{i}.upsamplers.0.conv", "decoder.up.{t-i-1}.upsample.conv"),
    Row("quant_conv", "quant_conv"),
    Row("post_quant_conv", "post_quant_conv"),
)

# The attention's modules, diffusers' names -> original names.
ORIGINAL_ATTENTION = {row.diffusers: row.original for row in _ATTENTION}

# Names that diffusers used for the attention before version 0.15, and still stand in published VAE files.
OLD_DIFFUSERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
