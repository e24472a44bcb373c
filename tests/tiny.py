"""Every model family in miniature: the real architectures and key names, a few megabytes, deterministic, no network.

Built from diffusers' and transformers' own classes, and brought into the original single-file layout by the rules
written out in tiny_original.py from the published layout, not by the program's converter: so these files can judge it.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from library.families.clip.tokenizer import ClipTokenizer
from tests.tiny_original import HF_CLIP, OPENCLIP, Tensors, openclip, openclip_extras, unet_name, vae_name

FAMILIES = ("sd1", "sd2")
SDXL_FAMILIES = ("sdxl", "refiner")
ALL = FAMILIES + SDXL_FAMILIES
IDS = {"sdxl": 6, "refiner": 5}  # numbers that go with an image; the U-Net sees 256 values of each


@dataclass(frozen=True)
class TinyModules:
    """The modules as diffusers and transformers make them, float32, in evaluation mode."""

    unet: Any  # UNet2DConditionModel
    vae: Any  # AutoencoderKL
    text_encoder: Any  # CLIPTextModel; for sd2 without the last layer, as diffusers folders have it; refiner: None
    last_layer: Tensors  # what only the single file has (logit_scale; sd2: last layer, text_projection), original names
    text_encoder_2: Any = None  # CLIPTextModelWithProjection of sdxl and refiner

    @property
    def text_encoders(self) -> dict[str, Any]:
        """The text encoders that there are, by the names of a diffusers folder."""
        both = {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        return {name: module for name, module in both.items() if module is not None}


def unet_config(family: str) -> dict[str, Any]:
    """UNet2DConditionModel's arguments: levels, depths and tensors (686; SDXL 1680) like the real one."""
    # They change where the real ones do (same tensor names); 64 below, as a group of one number cannot be normalised.
    widths = {"sd1": (64, 32, 64, 64), "sdxl": (64, 128, 64)}.get(family, (64, 128, 64, 64))
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": widths,
        "layers_per_block": 2,
        "cross_attention_dim": sum(text_config(family, name)["hidden_size"] for name in text_names(family)),
        "attention_head_dim": 8 if family == "sd1" else [width // 64 for width in widths],
        "use_linear_projection": family != "sd1",
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    }
    if family in IDS:
        attended = ("CrossAttnDownBlock2D",) * 2
        pooled = text_config(family, "text_encoder_2")["projection_dim"]
        config |= {
            "down_block_types": ("DownBlock2D", *attended) + (("DownBlock2D",) if family == "refiner" else ()),
            "up_block_types": (("UpBlock2D",) if family == "refiner" else ())
            + ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": 4 if family == "refiner" else [1, 2, 10],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": pooled + 256 * IDS[family],
        }
    return config


def small_unet() -> Any:
    """A U-Net of two levels, the same each time, for what happens to a module and does not ask which family it is."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
    )


def vae_config(family: str = "sd1") -> dict[str, Any]:
    """AutoencoderKL's arguments: four levels, hence stride 8, and 248 tensors like the real one."""
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (32, 64, 32, 32),
        "layers_per_block": 2,
        "sample_size": 64,
        "scaling_factor": 0.13025 if family in IDS else 0.18215,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }


def text_names(family: str) -> tuple[str, ...]:
    """The family's text encoders by the names of a diffusers folder."""
    return {"sdxl": ("text_encoder", "text_encoder_2"), "refiner": ("text_encoder_2",)}.get(family, ("text_encoder",))


def text_config(family: str, name: str = "text_encoder") -> dict[str, Any]:
    """CLIPTextConfig's arguments, with the real vocabulary. SD2's file has one layer more than this."""
    openclip = family == "sd2" or name == "text_encoder_2"
    return {
        "vocab_size": 49408,
        "hidden_size": 128 if openclip else 64,
        "intermediate_size": 512 if openclip else 256,
        "num_attention_heads": 2 if openclip else 1,
        "num_hidden_layers": 2 if family == "sd2" else 3,
        "max_position_embeddings": 77,
        "hidden_act": "gelu" if openclip else "quick_gelu",
        "projection_dim": 128 if openclip else 64,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


def diffusers_modules(family: str, seed: int = 0) -> TinyModules:
    """The family's modules with random weights of `seed`, to be changed at will."""
    return copy.deepcopy(_modules(family, seed))  # takes a third of the time


@lru_cache(maxsize=6)  # of 20 to 100 MB
def _modules(family: str, seed: int) -> TinyModules:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    text: dict[str, Any] = {"text_encoder": None, "text_encoder_2": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**unet_config(family)).eval()
        vae = AutoencoderKL(**vae_config(family)).eval()
        for name in text_names(family):
            kind = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
            text[name] = kind(CLIPTextConfig(**text_config(family, name))).eval()
            for parameter in text[name].parameters():  # CLIP starts nearly at zero; make its output depend on the words
                if parameter.ndim == 2:
                    torch.nn.init.normal_(parameter, std=0.1)
        extras = openclip_extras(text_config(family)) if family == "sd2" else {}
        if family in IDS:
            extras = {"logit_scale": torch.tensor(4.6052)}
    return TinyModules(unet, vae, text["text_encoder"], extras, text["text_encoder_2"])


def original_state_dict(family: str, seed: int = 0, *, text_model_level: bool = True) -> Tensors:
    """The miniature's tensors under the names of the original single files (float32)."""
    return {name: value.clone() for name, value in _original_tensors(family, seed, text_model_level).items()}


@lru_cache(maxsize=12)  # of 20 to 100 MB
def _original_tensors(family: str, seed: int, text_model_level: bool) -> Tensors:
    modules = _modules(family, seed)
    upsampler = 2 if family == "sdxl" else 1  # SDXL's deepest level has attention
    tensors = {
        f"model.diffusion_model.{unet_name(key, upsampler)}": value for key, value in modules.unet.state_dict().items()
    }
    for key, value in modules.vae.state_dict().items():
        name = f"first_stage_model.{vae_name(key)}"
        is_projection = "mid.attn_1" in name and name.endswith("weight") and ".norm." not in name
        tensors[name] = value[:, :, None, None] if is_projection else value
    for name, module in modules.text_encoders.items():
        text = {key.removeprefix("text_model."): value for key, value in module.state_dict().items()}
        if family == "sd2" or name == "text_encoder_2":
            text = openclip(text) | modules.last_layer
            prefix = OPENCLIP[family]
        else:
            prefix = HF_CLIP[family] + ("text_model." if text_model_level else "")
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
    more: Mapping[str, torch.Tensor] | None = None,
    extra: Mapping[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write the miniature in the original layout, as `.safetensors` or `.ckpt` by the path's ending.

    `position_ids`: those of SD1's text encoder and SDXL's first. `more`: further tensors (v_pred). `extra`: further
    entries at a .ckpt's top level (callbacks, global_step). `ema`: adds copies as real files have.
    """
    tensors = original_state_dict(family, seed, text_model_level=text_model_level) | dict(more or {})
    if position_ids and family in HF_CLIP:
        prefix = HF_CLIP[family] + ("text_model." if text_model_level else "")
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
    zero_terminal_snr: bool = False,
    variant: str | None = None,
) -> Path:
    """Write the miniature as a diffusers folder, loadable by the family's pipeline (`variant`: such as "fp16")."""
    modules = diffusers_modules(family, seed)
    modules.unet.to(dtype).save_pretrained(folder / "unet", variant=variant)
    modules.vae.to(dtype).save_pretrained(folder / "vae", variant=variant)
    prefix = "text_model." if text_model_level else ""  # transformers < 5.6 writes this level
    for name, module in modules.text_encoders.items():
        text = {key.removeprefix("text_model."): value.to(dtype) for key, value in module.state_dict().items()}
        projected = name == "text_encoder_2"  # this class has the level in any version
        level = "text_model." if projected else prefix
        text = {key if key.startswith("text_projection.") else level + key: value for key, value in text.items()}
        (folder / name).mkdir(parents=True, exist_ok=True)
        file = folder / name / ".".join(["model", *([variant] if variant else []), "safetensors"])
        save_file({key: value.contiguous() for key, value in text.items()}, file, metadata={"format": "pt"})
        kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
        config = {"architectures": [kind], "model_type": "clip_text_model"} | text_config(family, name)
        _write_json(folder / name / "config.json", config)
        openclip = family == "sd2" or projected
        ClipTokenizer(0 if openclip else 49407).save(folder / name.replace("text_encoder", "tokenizer"))
    _write_json(
        folder / "scheduler" / "scheduler_config.json", _scheduler_config(family, prediction, zero_terminal_snr)
    )
    _write_json(folder / "model_index.json", _model_index(family))
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


def write_images(folder: Path, n: int = 4, size: tuple[int, int] = (64, 64), seed: int = 0) -> list[Path]:
    """Write `n` small PNGs (coloured squares on a gradient), different from each other; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    width, height = size
    paths = []
    for index in range(n):
        image = Image.linear_gradient("L").resize(size).convert("RGB")
        for _ in range(4):
            x, y = draw.randrange(width), draw.randrange(height)
            colour = (draw.randrange(256), draw.randrange(256), draw.randrange(256))
            image.paste(colour, (x, y, min(width, x + width // 3), min(height, y + height // 3)))
        paths.append(folder / f"image_{index:02d}.png")
        image.save(paths[-1])
    return paths


def _scheduler_config(family: str, prediction: str, zero_terminal_snr: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
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
    if family in IDS:
        config |= {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    return config | ({"rescale_betas_zero_snr": True} if zero_terminal_snr else {})


def _model_index(family: str) -> dict[str, Any]:
    index: dict[str, Any] = {
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
    if family not in IDS:
        return index
    del index["requires_safety_checker"], index["safety_checker"]
    index |= {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }
    if family == "refiner":
        del index["image_encoder"]
        index |= {"_class_name": "StableDiffusionXLImg2ImgPipeline", "force_zeros_for_empty_prompt": False}
        index |= {"requires_aesthetics_score": True, "text_encoder": [None, None], "tokenizer": [None, None]}
    return index


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
