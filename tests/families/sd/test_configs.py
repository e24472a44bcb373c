"""Configurations are read from shapes: those of published models are the published ones. Contradictions are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from library.checkpoints.files import read_header
from library.checkpoints.header import CheckpointError, Header, TensorInfo
from library.checkpoints.lazy import LazyTensor
from library.families.registry import FAMILIES, detect, load_model
from library.families.sd.configs import read_configs
from tests import tiny

# --- the published models, by shape ---------------------------------------------------------------------------------

ATTENDED, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
# config.json of runwayml/stable-diffusion-v1-5, stabilityai/stable-diffusion-2-1, stable-diffusion-xl-base-1.0 and
# stable-diffusion-xl-refiner-1.0: what diffusers would otherwise take another value for
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "sdxl": {
        "block_out_channels": [320, 640, 1280],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "down_block_types": [PLAIN, ATTENDED, ATTENDED],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "sample_size": 128,
    },
    "refiner": {
        "block_out_channels": [384, 768, 1536, 1536],
        "transformer_layers_per_block": 4,
        "attention_head_dim": [6, 12, 24, 24],
        "cross_attention_dim": 1280,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2560,
        "down_block_types": [PLAIN, ATTENDED, ATTENDED, PLAIN],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "sample_size": 128,
    },
}


def clip(width: int, layers: int, activation: str) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "hidden_act": activation,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "layer_norm_eps": 1e-5,
    }


VIT_L, BIG_G = clip(768, 12, "quick_gelu"), clip(1280, 32, "gelu") | {"projection_dim": 1280}
TEXTS = {
    "sd1": {"text_encoder": VIT_L},
    "sd2": {"text_encoder": clip(1024, 23, "gelu")},
    "sdxl": {"text_encoder": VIT_L, "text_encoder_2": BIG_G},
    "refiner": {"text_encoder_2": BIG_G},
}


def full_size(family: str) -> dict[str, Any]:
    """The published model's modules, on the meta device."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    vae = tiny.vae_config(family) | {"block_out_channels": (128, 256, 512, 512)}
    vae["sample_size"] = 1024 if family in tiny.SDXL_FAMILIES else 512
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with torch.device("meta"):
        texts = {name: kinds[name](CLIPTextConfig(**config)) for name, config in TEXTS[family].items()}
        return {"unet": UNet2DConditionModel(**UNETS[family]), "vae": AutoencoderKL(**vae), **texts}


def as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("family", tiny.ALL)
def test_the_real_models_are_read_with_their_published_configurations(family: str) -> None:
    modules = full_size(family)
    tensors = {
        part: {
            name: LazyTensor(TensorInfo("F16", tuple(tensor.shape)), lambda: torch.empty(0))
            for name, tensor in module.state_dict().items()
        }
        for part, module in modules.items()
    }
    (known,) = (each for each in FAMILIES if each.name == family)
    configs = read_configs(known.variant, known, Header(Path("x"), "safetensors", {}), tensors, "epsilon")
    for part in ("unet", "vae"):
        different = {key for key, value in configs[part].items() if as_list(modules[part].config[key]) != value}
        # SD2's published ones differ among themselves here; upcasting changes no number in float32
        assert different <= ({"upcast_attention", "sample_size"} if family == "sd2" else set())
    assert {key: configs["unet"][key] for key in UNETS[family]} == UNETS[family]
    for name, expected in TEXTS[family].items():
        assert {key: configs[name][key] for key in expected} == expected


# --- contradictions -------------------------------------------------------------------------------------------------


def changed(header: Header, part: str, **entries: Any) -> Header:
    """A folder's header with other entries in the config.json of a part."""
    configs = {name: dict(config) for name, config in header.configs.items()}
    configs[part].update(entries)
    return Header(header.path, header.kind, header.tensors, header.metadata, configs, header.places)


@pytest.mark.parametrize(
    ("family", "part", "key", "value"),
    [
        ("sd1", "unet", "attention_head_dim", 4),
        ("sd1", "unet", "cross_attention_dim", 768),
        ("sd1", "vae", "scaling_factor", 0.13025),
        ("sd1", "vae", "shift_factor", 0.1159),
        ("sd1", "vae", "latents_mean", [0.1, 0, 0, 0]),
        ("sd1", "vae", "latents_std", [8.4, 7.2, 5.5, 8.8]),
        ("sd1", "vae", "act_fn", "gelu"),
        ("sd1", "vae", "norm_num_groups", 16),
        ("sd1", "vae", "norm_eps", 0.1),
        ("sd1", "unet", "act_fn", "gelu"),
        ("sd1", "unet", "norm_eps", 0.1),
        ("sd1", "unet", "freq_shift", 1),
        ("sd1", "text_encoder", "layer_norm_eps", 0.1),
        ("sd1", "text_encoder", "num_hidden_layers", 12),
        ("sdxl", "unet", "attention_head_dim", 8),
        ("sdxl", "unet", "addition_time_embed_dim", 128),
        ("sdxl", "unet", "projection_class_embeddings_input_dim", 2560),
        ("sdxl", "vae", "scaling_factor", 0.18215),
        ("sdxl", "text_encoder", "hidden_act", "gelu"),
        ("sdxl", "text_encoder_2", "num_attention_heads", 4),
        ("refiner", "text_encoder_2", "hidden_act", "quick_gelu"),
    ],
)
def test_a_folder_whose_config_contradicts_its_weights_is_refused(files, family, part, key, value) -> None:
    wrong = changed(read_header(files[f"{family} folder"]), part, **{key: value})
    with pytest.raises(CheckpointError, match=rf"config\.json.*{key} = {re.escape(str(value))}") as told:
        load_model(wrong)
    with pytest.raises(CheckpointError, match=re.escape(str(told.value))):
        detect(wrong).sizes(wrong)  # known before a weight is loaded


@pytest.mark.parametrize("family", tiny.ALL)
def test_every_config_that_diffusers_writes_is_taken(files, family) -> None:
    """With all entries, as of its current version and as of the version that published the models."""
    header = read_header(files[f"{family} folder"])
    whole = changed(
        changed(header, "vae", shift_factor=None, latents_mean=None, latents_std=None), "unet", freq_shift=0
    )
    assert detect(whole).sizes(whole)
    neutral = changed(header, "vae", shift_factor=0.0, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    assert detect(neutral).sizes(neutral)


@pytest.mark.parametrize(
    ("key", "value"), [("attention_head_dim", [1, 2, 1]), ("transformer_layers_per_block", (1, 2, 10))]
)
def test_a_config_that_says_the_same_otherwise_is_taken(files, key, value) -> None:
    assert detect(found := changed(read_header(files["sdxl folder"]), "unet", **{key: value})).sizes(found)


def test_a_folders_vae_config_says_nothing_of_another_vae(files, tmp_path) -> None:
    other = changed(read_header(files["sd1 folder"]), "vae", layers_per_block=7)
    model = load_model(other, vae=tiny.write_vae_file(tmp_path / "vae.safetensors"))
    expected = tiny.diffusers_modules("sd1", 5).vae.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.vae.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"add_embedding.linear_1.weight": (256, 1408)},
            "1408 additional inputs.* 6 sizes and the pooled text have 1664",
        ),
        ({".attn2.to_k.weight": (128, 96)}, "hidden states of width 96, its text encoders give 192"),
    ],
)
def test_parts_that_do_not_fit_together_are_told_apart_from_damage(files, changes, words) -> None:
    """A U-Net of the refiner with the text encoders of the base, say."""
    header = read_header(files["sdxl folder"])
    tensors = dict(header.tensors)
    for ending, shape in changes.items():
        tensors |= {name: TensorInfo("F32", shape) for name in tensors if name.endswith(ending)}
    mixed = Header(header.path, header.kind, tensors, {}, {"model_index": header.configs["model_index"]}, header.places)
    with pytest.raises(CheckpointError, match=f"not a model of Stable Diffusion XL: .*{words}"):
        detect(mixed).sizes(mixed)
