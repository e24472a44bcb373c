"""Rules between flags of adapters and preview images."""

from __future__ import annotations

from collections.abc import Mapping

from library.options.groups.adapter import SCRIPT
from library.options.groups.quantisation import NO_CHANGE
from library.options.rules.rule_kinds import (
    Excludes,
    Implies,
    NoEffect,
    Overrides,
    Required,
    Requires,
    both,
    is_one_of,
    off,
    on,
)

_SAMPLING = ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")

REQUIRED = (
    Required(
        "network_module",
        "there is no adapter to train",
        "set for example --network_module networks.lora",
        script=SCRIPT,
    ),
)

REQUIRES = (
    Requires(
        ("base_weights_multiplier", "base_weights"),
        on("base_weights_multiplier"),
        lambda values: len(_tuple(values["base_weights_multiplier"])) <= len(_tuple(values["base_weights"])),
        "there are more multipliers than adapters to merge",
        "give one for each file of --base_weights",
    ),
    *(
        Requires(
            (name, "base_model_precision"),
            on(name),
            is_one_of("base_model_precision", "no_change", "fp8", "fp8-quanto", "fp8-torchao"),
            f"{name} means base_model_precision fp8",
            "keep one of the two",
        )
        for name in ("fp8_base", "fp8_base_unet")
    ),
    *(
        Requires(
            (name, "sample_prompts"),
            on(name),
            on("sample_prompts"),
            "there are no prompts",
            "add --sample_prompts with a file of prompts, one per line",
        )
        for name in _SAMPLING
    ),
)

EXCLUDES = (
    Excludes(
        ("network_train_unet_only",),
        "network_train_text_encoder_only",
        "nothing would be left to train",
        "keep one of the two",
    ),
    Excludes(
        ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"),
        "network_train_text_encoder_only",
        "cached text encoder outputs cannot train the text encoder",
        "remove one of the two",
    ),
)

IMPLIES = (
    Implies(
        "dim_from_weights",
        both(on("dim_from_weights"), off("network_weights")),
        "dim_from_weights",
        False,
        "dim_from_weights has no effect: there is no adapter file to take ranks from (network_weights is not set)",
    ),
    Implies(
        "cache_text_encoder_outputs",
        on("cache_text_encoder_outputs", "network_module"),
        "network_train_unet_only",
        True,
        "the text encoder is not trained (network_train_unet_only): its outputs are cached",
    ),
)

OVERRIDES = (
    Overrides("sample_every_n_epochs", "sample_every_n_steps", "preview images are drawn every n epochs", (None,)),
    Overrides("initial_step", "initial_epoch", "the run starts at initial_step", (None,)),
)

_FORMATS = ("base_model_precision", *(f"text_encoder_{number}_precision" for number in (1, 2, 3)))


def _quantises_nothing(values: Mapping[str, object]) -> bool:
    full = all(values[name] in (None, NO_CHANGE) for name in _FORMATS)
    return full and not (values["fp8_base"] or values["fp8_base_unet"])


NO_EFFECT = (
    NoEffect("text_encoder_lr", on("network_train_unet_only"), "only the U-Net is trained (network_train_unet_only)"),
    NoEffect("unet_lr", on("network_train_text_encoder_only"), "only the text encoder is trained"),
    NoEffect(
        "network_dim",
        on("dim_from_weights", "network_weights"),
        "ranks are taken from network_weights (dim_from_weights)",
    ),
    NoEffect("quantise_probe", _quantises_nothing, "no part of the base model is quantised"),
    NoEffect("skip_until_initial_step", off("initial_step"), "initial_step is not set"),
    *(
        NoEffect(name, on("resume"), "the training state decides where the run starts (resume)")
        for name in ("initial_epoch", "initial_step")
    ),
    NoEffect(
        "wandb_api_key",
        lambda values: not is_one_of("log_with", "wandb", "all")(values),
        "log_with does not include wandb",
    ),
)


def _tuple(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else ()
