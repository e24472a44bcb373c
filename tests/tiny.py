"""Every model family in miniature: the real architectures and key names, a few megabytes, deterministic, no network.

Built from diffusers' and transformers' own classes, and brought into the original single-file layout by the rules
written out here from the published layout, not by the program's converter: so these files can judge it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from library.families.clip_tokenizer import ClipTokenizer

FAMILIES = ("sd1", "sd2")
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TinyModules:
    """The three modules as diffusers and transformers make them, float32, in evaluation mode."""

    unet: Any  # UNet2DConditionModel
    vae: Any  # AutoencoderKL
    text_encoder: Any  # CLIPTextModel; for sd2 without the last layer, as diffusers folders have it
    last_layer: Tensors  # sd2: what only the single file has (last layer, text_projection, logit_scale), original names


def unet_config(family: str) -> dict[str, Any]:
    """UNet2DConditionModel's arguments: four levels and 686 tensors like the real one."""
    sd2 = family == "sd2"
    # They change where the real ones do (same tensor names); 64 below, as a group of one number cannot be normalised.
    widths = (64, 128, 64, 64) if sd2 else (64, 32, 64, 64)
    return {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": widths,
        "layers_per_block": 2,
        "cross_attention_dim": text_config(family)["hidden_size"],
        "attention_head_dim": [width // 64 for width in widths] if sd2 else 8,
        "use_linear_projection": sd2,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    }


def vae_config() -> dict[str, Any]:
    """AutoencoderKL's arguments: four levels, hence stride 8, and 248 tensors like the real one."""
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (32, 64, 32, 32),
        "layers_per_block": 2,
        "sample_size": 64,
        "scaling_factor": 0.18215,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }


def text_config(family: str) -> dict[str, Any]:
    """CLIPTextConfig's arguments, with the real vocabulary. SD2's file has one layer more than this."""
    return {
        "vocab_size": 49408,
        "hidden_size": 128 if family == "sd2" else 64,
        "intermediate_size": 512 if family == "sd2" else 256,
        "num_attention_heads": 2 if family == "sd2" else 1,
        "num_hidden_layers": 2 if family == "sd2" else 3,
        "max_position_embeddings": 77,
        "hidden_act": "gelu" if family == "sd2" else "quick_gelu",
        "projection_dim": 128 if family == "sd2" else 64,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


def diffusers_modules(family: str, seed: int = 0) -> TinyModules:
    """The family's modules with random weights of `seed`."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**unet_config(family)).eval()
        vae = AutoencoderKL(**vae_config()).eval()
        text_encoder = CLIPTextModel(CLIPTextConfig(**text_config(family))).eval()
        for parameter in text_encoder.parameters():  # CLIP starts nearly at zero; make its output depend on the words
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.1)
        last_layer = _openclip_extras(text_config(family)) if family == "sd2" else {}
    return TinyModules(unet, vae, text_encoder, last_layer)


def original_state_dict(family: str, seed: int = 0, *, text_model_level: bool = True) -> Tensors:
    """The miniature's tensors under the names of the original single files (float32)."""
    modules = diffusers_modules(family, seed)
    tensors = {f"model.diffusion_model.{_unet_name(key)}": value for key, value in modules.unet.state_dict().items()}
    for key, value in modules.vae.state_dict().items():
        name = f"first_stage_model.{_vae_name(key)}"
        is_projection = "mid.attn_1" in name and name.endswith("weight") and ".norm." not in name
        tensors[name] = value[:, :, None, None] if is_projection else value
    text = modules.text_encoder.state_dict()
    if family == "sd2":
        text = _openclip(text) | modules.last_layer
        prefix = "cond_stage_model.model."
    else:
        prefix = "cond_stage_model.transformer." + ("text_model." if text_model_level else "")
    tensors |= {prefix + key: value for key, value in text.items()}
    return {key: value.detach().clone().contiguous() for key, value in tensors.items()}


def write_single_file(
    path: Path,
    family: str,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    text_model_level: bool = True,
    position_ids: bool = False,
    ema: bool = False,
    state_dict_level: bool = True,
    extra: Mapping[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write the miniature in the original layout, as `.safetensors` or `.ckpt` by the path's ending.

    `extra`: further entries at a .ckpt's top level (callbacks, global_step). `ema`: adds copies as real files have.
    """
    tensors = original_state_dict(family, seed, text_model_level=text_model_level)
    if position_ids and family == "sd1":
        prefix = "cond_stage_model.transformer." + ("text_model." if text_model_level else "")
        tensors[prefix + "embeddings.position_ids"] = torch.arange(77)[None]
    if ema:
        tensors["model_ema.num_updates"] = torch.tensor(7)
        tensors["model_ema.decay"] = torch.tensor(0.9999)
        tensors["model_ema.diffusion_modelinput_blocks00weight"] = tensors[
            "model.diffusion_model.input_blocks.0.0.weight"
        ].clone()
    tensors = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".ckpt":
        torch.save({"state_dict": tensors} | dict(extra or {}) if state_dict_level else tensors, path)
    else:
        save_file(tensors, path, metadata=metadata)
    return path


def write_diffusers(
    folder: Path,
    family: str,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    text_model_level: bool = True,
    prediction: str = "epsilon",
) -> Path:
    """Write the miniature as a diffusers folder, loadable by StableDiffusionPipeline.from_pretrained."""
    modules = diffusers_modules(family, seed)
    modules.unet.to(dtype).save_pretrained(folder / "unet")
    modules.vae.to(dtype).save_pretrained(folder / "vae")
    (folder / "text_encoder").mkdir(parents=True, exist_ok=True)
    prefix = "text_model." if text_model_level else ""  # transformers < 5.6 writes this level
    text = {prefix + key: value.to(dtype).contiguous() for key, value in modules.text_encoder.state_dict().items()}
    save_file(text, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"} | text_config(family)
    _write_json(folder / "text_encoder" / "config.json", config)
    ClipTokenizer(0 if family == "sd2" else 49407).save(folder / "tokenizer")
    _write_json(folder / "scheduler" / "scheduler_config.json", _scheduler_config(prediction))
    _write_json(folder / "model_index.json", _model_index())
    return folder


def write_vae_file(path: Path, seed: int = 5, *, prefix: str = "") -> Path:
    """Write a VAE alone in the original layout, bare or with `prefix` (such as "first_stage_model.")."""
    level = "first_stage_model."
    tensors = {
        prefix + key.removeprefix(level): value
        for key, value in original_state_dict("sd1", seed).items()
        if key.startswith(level)
    }
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors}, path)
    return path


def write_pictures(folder: Path, n: int = 4, size: tuple[int, int] = (64, 64), seed: int = 0) -> list[Path]:
    """Write `n` small PNGs (coloured squares on a gradient), different from each other; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    width, height = size
    paths = []
    for index in range(n):
        picture = Image.linear_gradient("L").resize(size).convert("RGB")
        for _ in range(4):
            x, y = draw.randrange(width), draw.randrange(height)
            colour = (draw.randrange(256), draw.randrange(256), draw.randrange(256))
            picture.paste(colour, (x, y, min(width, x + width // 3), min(height, y + height // 3)))
        paths.append(folder / f"picture_{index:02d}.png")
        picture.save(paths[-1])
    return paths


# --- the original layout, from its published description -------------------------------------------------------------


def _unet_name(key: str) -> str:
    """A diffusers U-Net key in the original naming (three layers a level: two resnets and a sampler)."""
    fixed = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
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
        return f"output_blocks.{3 * level + 2}.{1 if level == 0 else 2}.{rest}"
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


def _vae_name(key: str) -> str:
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


def _openclip(text: Mapping[str, torch.Tensor]) -> Tensors:
    """transformers' text encoder in OpenCLIP's naming, with q, k and v stacked."""
    tensors = {
        "token_embedding.weight": text["embeddings.token_embedding.weight"],
        "positional_embedding": text["embeddings.position_embedding.weight"],
        "ln_final.weight": text["final_layer_norm.weight"],
        "ln_final.bias": text["final_layer_norm.bias"],
    }
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
    names |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    layers = len({key.split(".")[2] for key in text if key.startswith("encoder.layers.")})
    for layer in range(layers):
        ours, theirs = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            tensors |= {f"{theirs}.{new}.{kind}": text[f"{ours}.{old}.{kind}"] for old, new in names.items()}
            stacked = [text[f"{ours}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            tensors[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(stacked)
    return tensors


def _openclip_extras(config: Mapping[str, Any]) -> Tensors:
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


def _scheduler_config(prediction: str) -> dict[str, Any]:
    return {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


def _model_index() -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
