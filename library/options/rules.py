"""Rules between flags as tables: required, requires, excludes, implies, overrides, told; each row with its why.

Rules that need the pictures, the model or the machine are the planner's; here stand those that flags alone decide.
settle.py applies them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Condition = Callable[[Mapping[str, object]], bool]


@dataclass(frozen=True)
class Required:
    """A run cannot do without the flag."""

    flag: str
    why: str
    remedy: str


@dataclass(frozen=True)
class Requires:
    """Where `when` holds, `holds` must hold too. `flags` are those the message shows, the first one being the cause."""

    flags: tuple[str, ...]
    when: Condition
    holds: Condition
    why: str
    remedy: str


@dataclass(frozen=True)
class Excludes:
    """None of the flags can be on together with the other."""

    flags: tuple[str, ...]
    other: str
    why: str
    remedy: str


@dataclass(frozen=True)
class Implies:
    """Where `when` holds and the target has another value, it gets this one. Without a `why` nothing is told."""

    cause: str
    when: Condition
    target: str
    value: object
    why: str = ""


@dataclass(frozen=True)
class Overrides:
    """Where both were given, the winner decides and the user is told. With `reset` the loser's value becomes that."""

    winner: str
    loser: str
    why: str
    reset: tuple[object, ...] = ()


@dataclass(frozen=True)
class Told:
    """A flag that is on and has no effect where `when` holds: the run goes on, the user is told why."""

    flag: str
    when: Condition
    why: str


def on(*names: str) -> Condition:
    """All of these are set and not off."""
    return lambda values: all(bool(values[name]) for name in names)


def off(*names: str) -> Condition:
    """None of these is set."""
    return lambda values: not any(bool(values[name]) for name in names)


def is_one_of(name: str, *wanted: object) -> Condition:
    """The flag has one of these values (texts in any case)."""
    return lambda values: _lower(values[name]) in {_lower(value) for value in wanted}


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _both(first: Condition, second: Condition) -> Condition:
    return lambda values: first(values) and second(values)


def _scheduler(*names: str) -> Condition:
    return _both(off("lr_scheduler_type"), is_one_of("lr_scheduler", *names))


def _has_argument(name: str, *keys: str) -> Condition:
    def holds(values: Mapping[str, object]) -> bool:
        arguments = values[name]
        members = arguments if isinstance(arguments, tuple) else ()
        return any(str(member).partition("=")[0].strip() in keys for member in members)

    return holds


REQUIRED = (
    Required(
        "pretrained_model_name_or_path",
        "there is no model to train",
        "name a .safetensors or .ckpt file or a diffusers folder",
    ),
    Required(
        "train_data_dir",
        "there are no pictures to train on",
        "name the folder that holds the folders <repeats>_<identifier> <class>",
    ),
    Required("resolution", "the size of training pictures is not known", "for example --resolution 512 or 512,768"),
    Required(
        "output_dir", "there is no folder for the trained model", "name a folder; it is made if it does not exist"
    ),
)

REQUIRES = (
    Requires(
        ("full_fp16", "mixed_precision"),
        on("full_fp16"),
        is_one_of("mixed_precision", "fp16"),
        "weights in fp16 are computed with in fp16",
        "add --mixed_precision fp16, or take --full_fp16 out",
    ),
    Requires(
        ("full_bf16", "mixed_precision"),
        on("full_bf16"),
        is_one_of("mixed_precision", "bf16"),
        "weights in bf16 are computed with in bf16",
        "add --mixed_precision bf16, or take --full_bf16 out",
    ),
    Requires(
        ("use_8bit_adam", "optimizer_type"),
        on("use_8bit_adam"),
        is_one_of("optimizer_type", "", "AdamW8bit"),
        "it is short for --optimizer_type AdamW8bit",
        "keep one of the two",
    ),
    Requires(
        ("use_lion_optimizer", "optimizer_type"),
        on("use_lion_optimizer"),
        is_one_of("optimizer_type", "", "Lion"),
        "it is short for --optimizer_type Lion",
        "keep one of the two",
    ),
    Requires(
        ("log_with", "logging_dir"),
        is_one_of("log_with", "tensorboard", "all"),
        on("logging_dir"),
        "tensorboard writes files, and no folder is named for them",
        "add --logging_dir with a folder",
    ),
    Requires(
        ("lr_scheduler", "optimizer_type"),
        _scheduler("adafactor"),
        lambda values: str(values["optimizer_type"]).lower().rpartition(".")[2] == "adafactor",
        "this scheduler shows the rates that the Adafactor optimiser chooses itself",
        "add --optimizer_type Adafactor, or choose another --lr_scheduler",
    ),
    Requires(
        ("lr_scheduler", "lr_scheduler_args"),
        _scheduler("piecewise_constant"),
        _has_argument("lr_scheduler_args", "step_rules"),
        "it needs the steps at which the rate changes",
        'add --lr_scheduler_args "step_rules=1:100,0.1:200,0.01" (factor:until step, ..., last factor)',
    ),
    Requires(
        ("lr_scheduler", "lr_scheduler_min_lr_ratio"),
        _scheduler("cosine_with_min_lr"),
        lambda values: (
            values["lr_scheduler_min_lr_ratio"] is not None
            or _has_argument("lr_scheduler_args", "min_lr", "min_lr_rate")(values)
        ),
        "it needs the rate at which to end",
        "add --lr_scheduler_min_lr_ratio, for example 0.1",
    ),
    Requires(
        ("no_token_padding", "max_token_length"),
        on("no_token_padding"),
        off("max_token_length"),
        "captions padded to the longest of their batch cannot be read in chunks of 75 tokens",
        "take one of the two out",
    ),
)

EXCLUDES = (
    Excludes(("full_fp16",), "full_bf16", "weights have one precision", "keep the one that goes with mixed_precision"),
    Excludes(
        ("use_8bit_adam",),
        "use_lion_optimizer",
        "they name two different optimisers",
        "keep one, or use --optimizer_type",
    ),
    Excludes(
        ("cache_latents", "cache_latents_to_disk"),
        "color_aug",
        "a cached image is encoded once, so its colours cannot vary",
        "take one of the two out",
    ),
    Excludes(
        ("cache_latents", "cache_latents_to_disk"),
        "random_crop",
        "a cached image is encoded once, so its crop cannot vary",
        "take one of the two out",
    ),
)

# In this order: a row sees what the rows before it changed.
IMPLIES = (
    Implies(
        "cache_latents_to_disk",
        on("cache_latents_to_disk"),
        "cache_latents",
        True,
        "cache_latents_to_disk includes cache_latents",
    ),
    Implies(
        "use_8bit_adam",
        on("use_8bit_adam"),
        "optimizer_type",
        "AdamW8bit",
        "use_8bit_adam means optimizer_type AdamW8bit",
    ),
    Implies(
        "use_lion_optimizer",
        on("use_lion_optimizer"),
        "optimizer_type",
        "Lion",
        "use_lion_optimizer means optimizer_type Lion",
    ),
    Implies("optimizer_type", off("optimizer_type"), "optimizer_type", "AdamW"),
    Implies(
        "lr_warmup_steps",
        _both(_scheduler("constant"), on("lr_warmup_steps")),
        "lr_scheduler",
        "constant_with_warmup",
        "lr_scheduler constant with a warm-up means constant_with_warmup",
    ),
    Implies(
        "lr_scheduler",
        _both(_scheduler("adafactor"), on("lr_warmup_steps")),
        "lr_warmup_steps",
        0,
        "lr_scheduler adafactor shows the optimiser's own rates; lr_warmup_steps has no effect on them",
    ),
    Implies(
        "use_safetensors",
        _both(on("use_safetensors"), is_one_of("save_model_as", "ckpt")),
        "save_model_as",
        "safetensors",
        "use_safetensors turns save_model_as ckpt into safetensors",
    ),
    Implies(
        "use_safetensors",
        _both(on("use_safetensors"), is_one_of("save_model_as", "diffusers")),
        "save_model_as",
        "diffusers_safetensors",
        "use_safetensors turns save_model_as diffusers into diffusers_safetensors",
    ),
    Implies("logging_dir", _both(on("logging_dir"), off("log_with")), "log_with", "tensorboard"),
    Implies(
        "max_data_loader_n_workers",
        off("max_data_loader_n_workers"),
        "persistent_data_loader_workers",
        False,
        "persistent_data_loader_workers has no effect with max_data_loader_n_workers 0",
    ),
)

OVERRIDES = (
    Overrides("xformers", "sdpa", "one attention is used: xformers", (False,)),
    Overrides("xformers", "mem_eff_attn", "one attention is used: xformers", (False,)),
    Overrides(
        "sdpa", "mem_eff_attn", "one attention is used: sdpa, which needs as little memory and is faster", (False,)
    ),
    Overrides("max_train_epochs", "max_train_steps", "the length of the training comes from max_train_epochs"),
    Overrides("lr_scheduler_type", "lr_scheduler", "the class given by lr_scheduler_type is the scheduler"),
    Overrides("save_every_n_epochs", "save_n_epoch_ratio", "models are saved as save_every_n_epochs says", (None,)),
)

_NO_EPOCH_SAVES = off("save_every_n_epochs", "save_n_epoch_ratio")

TOLD = (
    Told(
        "save_last_n_epochs", _NO_EPOCH_SAVES, "no models are saved at ends of epochs (save_every_n_epochs is not set)"
    ),
    Told(
        "save_last_n_epochs_state",
        _NO_EPOCH_SAVES,
        "no states are saved at ends of epochs (save_every_n_epochs is not set)",
    ),
    Told(
        "save_last_n_steps", off("save_every_n_steps"), "no models are saved by steps (save_every_n_steps is not set)"
    ),
    Told(
        "save_last_n_steps_state",
        off("save_every_n_steps"),
        "no states are saved by steps (save_every_n_steps is not set)",
    ),
    Told(
        "save_last_n_epochs_state",
        _both(off("save_state"), on("save_every_n_epochs")),
        "no states are saved (save_state is not set)",
    ),
    Told(
        "save_last_n_steps_state",
        _both(off("save_state"), on("save_every_n_steps")),
        "no states are saved (save_state is not set)",
    ),
    *(
        Told(name, off("logging_dir", "log_with"), "nothing is logged (logging_dir is not set)")
        for name in ("log_prefix", "log_tracker_name", "log_tracker_config", "log_config")
    ),
    Told("keep_tokens", off("shuffle_caption"), "parts of captions are not shuffled (shuffle_caption is not set)"),
    Told(
        "write_inference_yaml",
        is_one_of("save_model_as", "diffusers", "diffusers_safetensors"),
        "a diffusers folder needs none",
    ),
)
