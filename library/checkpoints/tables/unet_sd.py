"""U-Net of Stable Diffusion 1, 2, XL and XL's refiner: diffusers' module names | names in original files.

Letters: i level, j residual block of a level on the way down, k on the way up, d transformer block; s = residual blocks
of a level on the way up, u(i) = place of the upsampler (after the attention, where level i has one).
Source: CompVis/stable-diffusion ldm/modules/diffusionmodules/openaimodel.py, Stability-AI/generative-models
sgm/modules/diffusionmodules/openaimodel.py (label_emb) and diffusers' UNet2DConditionModel.
"""

from __future__ import annotations

from library.checkpoints.keymap import Row, within

_RESNET = (
    Row("norm1", "in_layers.0"),
    Row("conv1", "in_layers.2"),
    Row("time_emb_proj", "emb_layers.1"),
    Row("norm2", "out_layers.0"),
    Row("conv2", "out_layers.3"),
    Row("conv_shortcut", "skip_connection"),
)
_ATTENTION = tuple(
    Row(name, name)
    for name in (
        "norm",
        "proj_in",
        "proj_out",
        *(
            f"transformer_blocks.{{d}}.{inner}"
            for inner in (
                "norm1", "norm2", "norm3",
                "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
                "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
                "ff.net.0.proj", "ff.net.2",
            )
        ),
    )
)  # fmt: skip

ROWS: tuple[Row, ...] = (
    Row("time_embedding.linear_1", "time_embed.0"),
    Row("time_embedding.linear_2", "time_embed.2"),
    Row("conv_in", "input_blocks.0.0"),
    *within("down_blocks.{i}.resnets.{j}", "input_blocks.{s*i+j+1}.0", _RESNET),
    *within("down_blocks.{i}.attentions.{j}", "input_blocks.{s*i+j+1}.1", _ATTENTION),
    Row("down_blocks.{i}.downsamplers.0.conv", "input_blocks.{s*i+s}.0.op"),
    *within("mid_block.resnets.0", "middle_block.0", _RESNET),
    *within("mid_block.attentions.0", "middle_block.1", _ATTENTION),
    *within("mid_block.resnets.1", "middle_block.2", _RESNET),
    *within("up_blocks.{i}.resnets.{k}", "output_blocks.{s*i+k}.0", _RESNET),
    *within("up_blocks.{i}.attentions.{k}", "output_blocks.{s*i+k}.1", _ATTENTION),
    Row("up_blocks.{i}.upsamplers.0.conv", "output_blocks.{s*i+s-1}.{u}.conv"),
    Row("conv_norm_out", "out.0"),
    Row("conv_out", "out.2"),
)

# XL and its refiner are told more of an image: the pooled caption, sizes and crop.
XL_ROWS: tuple[Row, ...] = (
    *ROWS,
    Row("add_embedding.linear_1", "label_emb.0.0"),
    Row("add_embedding.linear_2", "label_emb.0.2"),
)
