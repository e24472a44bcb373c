"""Keys of front-ends' own settings in their configuration files, which are ignored silently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from library.options.sources import RawOption

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

_ADAPTER_FILES = (".safetensors", ".pt", ".ckpt")
_KNOWN = frozenset(key for keys in _KEYS.values() for key in keys)


def adapter_file_of_ranks(options: Mapping[str, RawOption]) -> Mapping[str, RawOption]:
    """LoRA_Easy_Training_Scripts writes the path of the adapter's file as dim_from_weights, which is a switch.

    It is then on, and the file is that of network_weights unless another one is named.
    """
    ranks, weights = options.get("dim_from_weights"), options.get("network_weights")
    if ranks is None or not str(ranks.raw).lower().endswith(_ADAPTER_FILES):
        return options
    named = ranks if weights is None or not weights.raw else weights
    return {
        **options,
        "dim_from_weights": replace(ranks, raw=True),
        "network_weights": replace(named, name="network_weights"),
    }


def is_silent(key: str, value: object) -> bool:
    """Whether a key of a file is a front-end's own and can be ignored silently."""
    if key in _SILENT_WHEN_OFF:
        return not value
    return key in _KNOWN


def is_known(key: str) -> bool:
    """Whether a key of a file belongs to a front-end, and so is not a misspelt flag."""
    return key in _KNOWN
