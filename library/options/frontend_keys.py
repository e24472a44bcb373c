"""Keys of front-ends' own settings in their configuration files, which are ignored silently."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# Front-end -> keys.
_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "kohya_ss": (
            "epoch",
            "noise_offset_type",
        ),
        "lora-scripts": (
            "cfg_trunc",
            "enable_base_weight",
            "enable_block_weights",
            "enable_preview",
            "gpu_ids",
            "model_train_type",
            "positive_prompts",
            "negative_prompts",
            "prompt_file",
            "randomly_choice_prompt",
            "renorm_cfg",
            "sample_cfg",
            "sample_height",
            "sample_seed",
            "sample_steps",
            "sample_width",
            "train_t5xxl",
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
# Ignored silently only when off: on, it trains another text encoder.
_SILENT_WHEN_OFF = frozenset({"train_t5xxl"})

_KNOWN = frozenset(key for keys in _KEYS.values() for key in keys)


def is_silent(key: str, value: object) -> bool:
    """Whether a key of a file is a front-end's own and can be ignored silently."""
    if key in _SILENT_WHEN_OFF:
        return not value
    return key in _KNOWN


def is_known(key: str) -> bool:
    """Whether a key of a file belongs to a front-end, and so is not a misspelt flag."""
    return key in _KNOWN
