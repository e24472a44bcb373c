"""Flags of later versions, known by name, type and default, so that none is ignored silently.

A flag at a neutral value (its default, off, or what front-ends always send) is accepted. Any other value is a mistake
if ignoring it would change the trained weights; otherwise it is listed in one note.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from library.options.convert_values import format_value
from library.options.flag import Flag
from library.options.mistakes import Mistake

WEIGHTS = "weights"
OTHER = "other"


@dataclass(frozen=True)
class FutureFlag:
    """A flag that this version knows but does not support."""

    name: str
    kind: str  # a value of flag.KINDS
    default: Any = None
    changes: str = WEIGHTS  # what ignoring it would change: WEIGHTS or OTHER (speed, memory, logs, images, uploads)
    neutral: tuple[Any, ...] = ()  # more values without effect
    only_with: tuple[str, ...] = ()  # has an effect only if one of these is on: "flag" or "flag=value"

    @property
    def is_refused(self) -> bool:
        """Whether a run with it ends, and does not go on without."""
        return self.changes == WEIGHTS

    def flag(self) -> Flag:
        """The flag for convert()."""
        return Flag(name=self.name, group="", kind=self.kind, default=self.default, help="")


@dataclass(frozen=True)
class FutureFlagValue:
    """A flag of a later version with the user's value and its origin."""

    definition: FutureFlag
    value: Any
    origin: str


def _switch(name: str, changes: str = WEIGHTS, **facts: Any) -> FutureFlag:
    return FutureFlag(name, "switch", False, changes, **facts)


_DATA = (
    _switch("cache_info", OTHER),
    _switch("persistent_data_loader_workers", neutral=(True,)),  # workers always persist between epochs
    FutureFlag("dataset_class", "text"),
)


# Of sd-scripts 0.10 and 0.11.
_NEWER = (
    _switch("cuda_allow_tf32", OTHER),
    _switch("cuda_cudnn_benchmark", OTHER),
    FutureFlag("show_timesteps", "text", None, OTHER),
    FutureFlag("show_timesteps_offset", "number", None, OTHER, only_with=("show_timesteps",)),
    FutureFlag("show_timesteps_resolution", "text", None, OTHER, only_with=("show_timesteps",)),
    FutureFlag("skip_image_resolution", "width,height"),
    _switch("train_inpainting"),
    # LECO
    FutureFlag("leco_denoise_guidance_scale", "number", 3.0, only_with=("prompts_file",)),
    FutureFlag("max_denoising_steps", "integer", 40, only_with=("prompts_file",)),
    FutureFlag("prompts_file", "path"),
)

# Of sd-scripts' programs for other models and for textual inversion.
_OTHER_PROGRAMS = (
    FutureFlag("ae", "path"),
    _switch("apply_lg_attn_mask", only_with=("clip_g",)),
    _switch("apply_t5_attn_mask", only_with=("t5xxl",)),
    _switch("block_swap_h2d_only", OTHER, neutral=(True,)),  # frozen blocks are never copied back
    FutureFlag("block_swap_ring_size", "integer", 2, OTHER, only_with=("blocks_to_swap",)),
    FutureFlag("clip_g", "path"),
    FutureFlag("clip_g_dropout_rate", "number", 0.0, only_with=("clip_g",)),
    FutureFlag("clip_l", "path"),
    FutureFlag("clip_l_dropout_rate", "number", 0.0, only_with=("clip_l",)),
    FutureFlag("controlnet_model_name_or_path", "path"),
    FutureFlag("discrete_flow_shift", "number", 3.0, only_with=("t5xxl", "timestep_sampling")),
    FutureFlag("double_blocks_to_swap", "integer", None, OTHER, neutral=(0,)),
    _switch("enable_scaled_pos_embed", only_with=("t5xxl",)),
    FutureFlag("guidance_scale", "number", 3.5, only_with=("t5xxl",)),
    FutureFlag("init_word", "text", only_with=("token_string",)),
    FutureFlag("logit_mean", "number", 0.0, only_with=("weighting_scheme=logit_normal",)),
    FutureFlag("logit_std", "number", 1.0, only_with=("weighting_scheme=logit_normal",)),
    FutureFlag("mode_scale", "number", 1.29, only_with=("weighting_scheme=mode",)),
    FutureFlag("model_prediction_type", "text", "sigma_scaled", only_with=("t5xxl",)),
    FutureFlag("model_type", "text", "flux"),
    FutureFlag("num_vectors_per_token", "integer", 1, only_with=("token_string",)),
    FutureFlag("pos_emb_random_crop_rate", "number", 0.0, only_with=("enable_scaled_pos_embed",)),
    _switch("qwen_image_vae_2d", OTHER),
    _switch("save_clip", OTHER, only_with=("clip_l",)),
    _switch("save_t5xxl", OTHER, only_with=("t5xxl",)),
    FutureFlag("sigmoid_scale", "number", 1.0, only_with=("timestep_sampling",)),
    FutureFlag("single_blocks_to_swap", "integer", None, OTHER, neutral=(0,)),
    _switch("split_mode", OTHER, only_with=("t5xxl",)),
    FutureFlag("t5_dropout_rate", "number", 0.0, only_with=("t5xxl",)),
    FutureFlag("t5xxl", "path"),
    FutureFlag("t5xxl_device", "text", None, OTHER, only_with=("t5xxl",)),
    FutureFlag("t5xxl_dtype", "text", only_with=("t5xxl",)),
    FutureFlag("t5xxl_max_token_length", "integer", only_with=("t5xxl",)),
    FutureFlag("text_encoder_batch_size", "integer", None, OTHER, neutral=(0,)),
    FutureFlag("timestep_sampling", "text", "sigma"),
    FutureFlag("token_string", "text"),
    FutureFlag("training_shift", "number", 1.0, only_with=("t5xxl", "weighting_scheme")),
    _switch("use_object_template", only_with=("token_string",)),
    _switch("use_style_template", only_with=("token_string",)),
    FutureFlag("weighting_scheme", "text", "uniform", neutral=("none",)),
    FutureFlag("weights", "path", only_with=("token_string",)),
)

# Of SimpleTuner.
_SIMPLETUNER = (
    FutureFlag("scheduled_sampling_order", "integer", 2, only_with=("scheduled_sampling_max_step_offset",)),
    _switch("scheduled_sampling_reflexflow", only_with=("scheduled_sampling_max_step_offset",)),
    *(
        FutureFlag(
            f"scheduled_sampling_reflexflow_{name}", "number", default, only_with=("scheduled_sampling_reflexflow",)
        )
        for name, default in (("alpha", 1.0), ("beta1", 10.0), ("beta2", 1.0))
    ),
)

FUTURE_FLAGS: Mapping[str, FutureFlag] = MappingProxyType(
    {row.name: row for rows in (_DATA, _NEWER, _OTHER_PROGRAMS, _SIMPLETUNER) for row in rows}
)


def check_future_flags(
    set_flags: Mapping[str, FutureFlagValue], values: Mapping[str, object]
) -> tuple[list[Mistake], list[FutureFlagValue]]:
    """Return mistakes for flags that would change the weights, and the other flags, which are ignored with a note.

    `values` are this version's own flags, on which some later ones depend. A flag that depends on a refused one is not
    reported separately.
    """
    refused: list[FutureFlagValue] = []
    ignored: list[FutureFlagValue] = []
    for entry in set_flags.values():
        if _is_neutral(entry):
            continue
        governors = list(_governors(entry.definition, set_flags, values))
        if entry.definition.only_with and not governors:
            continue
        if any(governor in FUTURE_FLAGS and FUTURE_FLAGS[governor].is_refused for governor in governors):
            continue
        if entry.definition.is_refused:
            refused.append(entry)
        else:
            ignored.append(entry)
    return list(_refusals(refused)), ignored


def describe_ignored(ignored: list[FutureFlagValue]) -> str:
    """One note for all flags that are ignored without effect on the weights."""
    names = ", ".join(f"{entry.definition.name} ({entry.origin})" for entry in ignored)
    return f"not supported in this version and ignored, without effect on the trained weights: {names}"


def _is_neutral(entry: FutureFlagValue) -> bool:
    return entry.value == entry.definition.default or entry.value in entry.definition.neutral


def _governors(
    definition: FutureFlag, set_flags: Mapping[str, FutureFlagValue], values: Mapping[str, object]
) -> Iterator[str]:
    """Yield the flags of `only_with` that are on."""
    for condition in definition.only_with:
        name, _, required = condition.partition("=")
        entry = set_flags.get(name)
        value = values.get(name) if entry is None or _is_neutral(entry) else entry.value
        if value == required if required else bool(value):
            yield name


def _refusals(refused: list[FutureFlagValue]) -> Iterator[Mistake]:
    for entry in refused:
        default = entry.definition.default
        other = "" if default in (None, False, "") else f" or set it to its default {format_value(default)}"
        yield Mistake(
            f"--{_describe(entry)} ({entry.origin}) is not supported in this version, "
            "and ignoring it would change the trained weights",
            f"remove it{other}",
        )


def _describe(entry: FutureFlagValue) -> str:
    value = list(entry.value) if isinstance(entry.value, tuple) else entry.value
    return f"{entry.definition.name} = {format_value(value)}"
