"""Names of the original single files for what diffusers and transformers build: rules written out from the published
layout (CompVis/stable-diffusion, Stability-AI/generative-models, mlfoundations/open_clip), not by the program's
converter, so that they can judge it. Works for any number of levels with two residual blocks each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

# where a file has its text encoders: named as transformers names them, and as OpenCLIP does
HF_CLIP = {"sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
OPENCLIP = {
    "sd2": "cond_stage_model.model.",
    "sdxl": "conditioner.embedders.1.model.",
    "refiner": "conditioner.embedders.0.model.",
}


def unet_name(key: str, first_upsampler: int = 1) -> str:
    """A diffusers U-Net key in the original naming (three layers a level: two resnets and a sampler).

    `first_upsampler`: its place in the deepest level's last block, 2 where that level has attention (SDXL).
    """
    fixed = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for old, new in fixed.items():
        if key.startswith(old + "."):
            return new + key[len(old) :]
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key):
        index = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{index}.{_resnet_name(match[3])}"
    match = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", key)
    if match is None:
        raise KeyError(key)
    side, level, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{3 * (level + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * level + 2}.{first_upsampler if level == 0 else 2}.{rest}"
    block = f"input_blocks.{3 * level + layer + 1}" if side == "down" else f"output_blocks.{3 * level + layer}"
    return f"{block}.{1 if kind == 'attentions' else 0}.{_resnet_name(rest)}"


def _resnet_name(rest: str) -> str:
    parts = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    head, _, tail = rest.partition(".")
    return f"{parts[head]}.{tail}" if head in parts else rest


def vae_name(key: str) -> str:
    """A diffusers VAE key in the original naming."""
    key = re.sub(r"decoder\.up_blocks\.(\d)", lambda match: f"decoder.up.{3 - int(match[1])}", key)
    key = re.sub(r"encoder\.down_blocks\.(\d)", r"encoder.down.\1", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", key)
    key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("resnets.", "block.")
    key = key.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    if "mid.attn_1" in key:
        for old, new in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            key = key.replace(f".{old}.", f".{new}.")
    return key


def openclip(text: Mapping[str, torch.Tensor]) -> Tensors:
    """transformers' text encoder (without `text_model.`) in OpenCLIP's naming, with q, k and v stacked.

    OpenCLIP multiplies the pooled state by its bare text_projection from the right; a Linear's weight is the other way
    round.
    """
    tensors = {
        "token_embedding.weight": text["embeddings.token_embedding.weight"],
        "positional_embedding": text["embeddings.position_embedding.weight"],
        "ln_final.weight": text["final_layer_norm.weight"],
        "ln_final.bias": text["final_layer_norm.bias"],
    }
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
    names |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    if "text_projection.weight" in text:
        tensors["text_projection"] = text["text_projection.weight"].T
    layers = len({key.split(".")[2] for key in text if key.startswith("encoder.layers.")})
    for layer in range(layers):
        ours, theirs = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            tensors |= {f"{theirs}.{new}.{kind}": text[f"{ours}.{old}.{kind}"] for old, new in names.items()}
            stacked = [text[f"{ours}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            tensors[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(stacked)
    return tensors


def openclip_extras(config: Mapping[str, Any]) -> Tensors:
    """The 14 tensors that SD2's single file has and its diffusers folder lacks."""
    width, inner, layer = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    shapes = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (inner, width),
        "mlp.c_fc.bias": (inner,),
        "mlp.c_proj.weight": (width, inner),
        "mlp.c_proj.bias": (width,),
    }
    tensors = {f"transformer.resblocks.{layer}.{name}": torch.randn(shape) * 0.1 for name, shape in shapes.items()}
    return tensors | {"text_projection": torch.randn(width, width) * 0.1, "logit_scale": torch.tensor(4.6052)}
