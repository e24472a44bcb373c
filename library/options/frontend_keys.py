"""Keys of front-ends' own settings in their configuration files, which are ignored silently."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# Front-end -> keys.
_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "kohya_ss": (
            "compile",
            "double_blocks_to_swap",
            "epoch",
            "noise_offset_type",
            "qwen_image_vae_2d",
            "show_timesteps",
            "show_timesteps_resolution",
            "single_blocks_to_swap",
            "train_inpainting",
        ),
        "lora-scripts": (
            "algo",
            "block_lr_zero_threshold",
            "cfg_trunc",
            "conv_alpha",
            "conv_dim",
            "down_lr_weight",
            "dropout",
            "dylora_unit",
            "enable_base_weight",
            "enable_block_weights",
            "enable_preview",
            "gpu_ids",
            "lokr_factor",
            "lycoris_algo",
            "mid_lr_weight",
            "model_train_type",
            "network_args_custom",
            "optimizer_args_custom",
            "positive_prompts",
            "negative_prompts",
            "prodigy_d0",
            "prodigy_d_coef",
            "prompt_file",
            "randomly_choice_prompt",
            "renorm_cfg",
            "sample_cfg",
            "sample_height",
            "sample_seed",
            "sample_steps",
            "sample_width",
            "train_norm",
            "train_t5xxl",
            "up_lr_weight",
        ),
        "LoRA_Easy_Training_Scripts": (
            "easy_name",
            "save_toml",
            "save_toml_location",
            "tag_file_location",
            "tag_occurrence",
        ),
    }
)
_PREFIXES = ("compile_",)  # compile_mode and others of kohya_ss

# Ignored silently only when off: on, they select another kind of training.
_SILENT_WHEN_OFF = frozenset({"train_inpainting", "train_t5xxl"})

_KNOWN = frozenset(key for keys in _KEYS.values() for key in keys)


def is_silent(key: str, value: object) -> bool:
    """Whether a key of a file is a front-end's own and can be ignored silently."""
    if key in _SILENT_WHEN_OFF:
        return not value
    return key in _KNOWN or key.startswith(_PREFIXES)


def is_known(key: str) -> bool:
    """Whether a key of a file belongs to a front-end, and so is not a misspelt flag."""
    return key in _KNOWN or key.startswith(_PREFIXES)
