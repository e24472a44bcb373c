"""Tables of rules that depend on flags alone, each row with its reason; apply_rules.py applies them.

Rules that need the images, the model or the machine are in the plan.
"""

from __future__ import annotations

from collections.abc import Mapping

from library.options.rules import adapter as adapter_rules
from library.options.rules import averaging as averaging_rules
from library.options.rules import blocks as block_rules
from library.options.rules import deepspeed as deepspeed_rules
from library.options.rules import hub as hub_rules
from library.options.rules import objective as objective_rules
from library.options.rules import preservation as preservation_rules
from library.options.rules import rollout as rollout_rules
from library.options.rules import text_encoders as text_encoder_rules
from library.options.rules import update as update_rules
from library.options.rules.rule_kinds import (
    Condition,
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


def _scheduler(*names: str) -> Condition:
    return both(off("lr_scheduler_type"), is_one_of("lr_scheduler", *names))


def _has_argument(name: str, *keys: str) -> Condition:
    def holds(values: Mapping[str, object]) -> bool:
        arguments = values[name]
        members = arguments if isinstance(arguments, tuple) else ()
        return any(str(member).partition("=")[0].strip() in keys for member in members)

    return holds


# Flags that replace train_data_dir.
DATASET_FILES = ("dataset_config", "data_backend_config")
_TAG_CHANGES = ("shuffle_caption", "token_warmup_step", "caption_tag_dropout_rate")

REQUIRED = (
    Required(
        "pretrained_model_name_or_path",
        "there is no model to train",
        "name a .safetensors or .ckpt file or a diffusers folder",
    ),
    Required(
        "train_data_dir",
        "there are no images to train on",
        "name the folder that holds the folders <repeats>_<identifier> <class>",
        unless=DATASET_FILES,
    ),
    Required(
        "resolution",
        "the training resolution is unknown",
        "set for example --resolution 512 or 512,768",
        unless=DATASET_FILES,
    ),
    Required(
        "output_dir", "there is no folder for the trained model", "name a folder; it is created if it does not exist"
    ),
    *adapter_rules.REQUIRED,
)

REQUIRES = (
    Requires(
        ("full_fp16", "mixed_precision"),
        on("full_fp16"),
        is_one_of("mixed_precision", "fp16"),
        "full_fp16 requires mixed_precision fp16",
        "add --mixed_precision fp16, or remove --full_fp16",
    ),
    Requires(
        ("full_bf16", "mixed_precision"),
        on("full_bf16"),
        is_one_of("mixed_precision", "bf16"),
        "full_bf16 requires mixed_precision bf16",
        "add --mixed_precision bf16, or remove --full_bf16",
    ),
    Requires(
        ("use_8bit_adam", "optimizer_type"),
        on("use_8bit_adam"),
        is_one_of("optimizer_type", "", "AdamW8bit"),
        "it means --optimizer_type AdamW8bit",
        "keep one of the two",
    ),
    Requires(
        ("use_lion_optimizer", "optimizer_type"),
        on("use_lion_optimizer"),
        is_one_of("optimizer_type", "", "Lion"),
        "it means --optimizer_type Lion",
        "keep one of the two",
    ),
    Requires(
        ("log_with", "logging_dir"),
        is_one_of("log_with", "tensorboard", "all"),
        on("logging_dir"),
        "tensorboard needs a log folder",
        "add --logging_dir with a folder",
    ),
    Requires(
        ("preview_target", "log_with"),
        is_one_of("preview_target", "tensorboard"),
        lambda values: bool(values["log_with"] or values["logging_dir"]),
        "nothing logs the run",
        "add --logging_dir with a folder",
    ),
    Requires(
        ("preview_target", "webhook_config"),
        is_one_of("preview_target", "webhook"),
        on("webhook_config"),
        "there is no webhook",
        "add --webhook_config with a file",
    ),
    Requires(
        ("lr_scheduler", "optimizer_type"),
        _scheduler("adafactor"),
        lambda values: str(values["optimizer_type"]).lower().rpartition(".")[2] == "adafactor",
        "this scheduler only reports the learning rates that the Adafactor optimizer chooses",
        "add --optimizer_type Adafactor, or choose another --lr_scheduler",
    ),
    Requires(
        ("lr_scheduler", "lr_scheduler_args"),
        _scheduler("piecewise_constant"),
        _has_argument("lr_scheduler_args", "step_rules"),
        "it needs the steps at which the learning rate changes",
        'add --lr_scheduler_args "step_rules=1:100,0.1:200,0.01" (factor:until step, ..., last factor)',
    ),
    Requires(
        ("lr_scheduler", "lr_scheduler_min_lr_ratio"),
        _scheduler("cosine_with_min_lr"),
        lambda values: (
            values["lr_scheduler_min_lr_ratio"] is not None
            or _has_argument("lr_scheduler_args", "min_lr", "min_lr_rate")(values)
        ),
        "it needs a minimum learning rate",
        "add --lr_scheduler_min_lr_ratio, for example 0.1",
    ),
    Requires(
        ("no_token_padding", "max_token_length"),
        on("no_token_padding"),
        off("max_token_length"),
        "captions that are not padded to 75 tokens cannot be split into chunks of 75",
        "remove one of the two",
    ),
    Requires(
        ("num_repeats", "class_tokens"),
        lambda values: values["num_repeats"] != 1,
        on("class_tokens"),
        "folder names such as 10_sks dog set the repeats",
        'add --class_tokens "sks dog" for a plain folder, or put the repeats into its name: 10_sks dog',
    ),
    Requires(
        ("in_json", "train_data_dir"),
        on("in_json"),
        on("train_data_dir"),
        "its entries are file names in that folder",
        "add --train_data_dir with the folder of the images",
    ),
    *hub_rules.REQUIRES,
    *text_encoder_rules.REQUIRES,
    *adapter_rules.REQUIRES,
)

EXCLUDES = (
    Excludes(
        ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"),
        "no_token_padding",
        "cached captions all have the same length",
        "remove one of the two",
    ),
    Excludes(("dataset_config",), "data_backend_config", "only one file can describe the data", "keep one of the two"),
    Excludes(("in_json",), "class_tokens", "the metadata file already has the captions", "keep one of the two"),
    Excludes(
        ("enable_bucket",),
        "face_crop_aug_range",
        "face crops do not use buckets",
        "remove one of the two",
    ),
    Excludes(
        ("cache_latents", "cache_latents_to_disk"),
        "face_crop_aug_range",
        "cached latents have a fixed crop",
        "remove one of the two",
    ),
    Excludes(
        ("full_fp16",),
        "full_bf16",
        "weights can have only one precision",
        "keep the one that matches --mixed_precision",
    ),
    Excludes(
        ("use_8bit_adam",),
        "use_lion_optimizer",
        "they name two different optimizers",
        "keep one, or use --optimizer_type",
    ),
    Excludes(
        ("cache_latents", "cache_latents_to_disk"),
        "color_aug",
        "cached latents have fixed colours",
        "remove one of the two",
    ),
    Excludes(
        ("cache_latents", "cache_latents_to_disk"),
        "random_crop",
        "cached latents have a fixed crop",
        "remove one of the two",
    ),
    *adapter_rules.EXCLUDES,
    *averaging_rules.EXCLUDES,
    *update_rules.EXCLUDES,
)

# Order matters: a row sees the changes of the rows before it.
IMPLIES = (
    Implies(
        "cache_text_encoder_outputs_to_disk",
        on("cache_text_encoder_outputs_to_disk"),
        "cache_text_encoder_outputs",
        True,
        "cache_text_encoder_outputs_to_disk includes cache_text_encoder_outputs",
    ),
    *text_encoder_rules.IMPLIES,
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
    Implies("diffusers_xformers", on("diffusers_xformers"), "xformers", True, "diffusers_xformers means xformers"),
    Implies(
        "lr_warmup_steps",
        both(_scheduler("constant"), on("lr_warmup_steps")),
        "lr_scheduler",
        "constant_with_warmup",
        "lr_scheduler constant with a warm-up means constant_with_warmup",
    ),
    Implies(
        "lr_scheduler",
        both(_scheduler("adafactor"), on("lr_warmup_steps")),
        "lr_warmup_steps",
        0,
        "lr_scheduler adafactor reports the optimizer's own learning rates; lr_warmup_steps has no effect",
    ),
    Implies(
        "use_safetensors",
        both(on("use_safetensors"), is_one_of("save_model_as", "ckpt")),
        "save_model_as",
        "safetensors",
        "use_safetensors turns save_model_as ckpt into safetensors",
    ),
    Implies(
        "use_safetensors",
        both(on("use_safetensors"), is_one_of("save_model_as", "diffusers")),
        "save_model_as",
        "diffusers_safetensors",
        "use_safetensors turns save_model_as diffusers into diffusers_safetensors",
    ),
    Implies("logging_dir", both(on("logging_dir"), off("log_with")), "log_with", "tensorboard"),
    Implies(
        "masked_loss",
        both(on("masked_loss"), off("conditioning_data_dir", "alpha_mask", *DATASET_FILES)),
        "masked_loss",
        False,
        "masked_loss has no effect: there are no masks (set conditioning_data_dir, or alpha_mask for transparency)",
    ),
    *adapter_rules.IMPLIES,
    *block_rules.IMPLIES,
)

OVERRIDES = (
    *(
        Overrides(file, name, "that file defines the datasets", (None,))
        for file in DATASET_FILES
        for name in ("train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir", "class_tokens")
    ),
    *(
        Overrides(winner, loser, "xformers attention is used", (False,))
        for winner in ("xformers", "diffusers_xformers")
        for loser in ("sdpa", "mem_eff_attn")
    ),
    Overrides("sdpa", "mem_eff_attn", "sdpa needs as little memory and is faster", (False,)),
    Overrides("max_train_epochs", "max_train_steps", "the length of the training comes from max_train_epochs"),
    Overrides("lr_scheduler_type", "lr_scheduler", "the scheduler is the class in lr_scheduler_type"),
    Overrides("save_every_n_epochs", "save_n_epoch_ratio", "models are saved every n epochs", (None,)),
    *adapter_rules.OVERRIDES,
)

_OWN_REPEATS = both(off("in_json", "dataset_config"), lambda values: values["dataset_repeats"] != 1)
_NO_EPOCH_SAVES = off("save_every_n_epochs", "save_n_epoch_ratio")

NO_EFFECT = (
    NoEffect("save_last_n_epochs", _NO_EPOCH_SAVES, "no models are saved by epochs (save_every_n_epochs is not set)"),
    NoEffect(
        "save_last_n_epochs_state",
        _NO_EPOCH_SAVES,
        "no training states are saved by epochs (save_every_n_epochs is not set)",
    ),
    NoEffect(
        "save_last_n_steps", off("save_every_n_steps"), "no models are saved by steps (save_every_n_steps is not set)"
    ),
    NoEffect(
        "save_last_n_steps_state",
        off("save_every_n_steps"),
        "no training states are saved by steps (save_every_n_steps is not set)",
    ),
    NoEffect(
        "save_last_n_epochs_state",
        both(off("save_state"), on("save_every_n_epochs")),
        "no training states are saved (save_state is not set)",
    ),
    NoEffect(
        "save_last_n_steps_state",
        both(off("save_state"), on("save_every_n_steps")),
        "no training states are saved (save_state is not set)",
    ),
    *(
        NoEffect(name, off("logging_dir", "log_with"), "nothing is logged (logging_dir is not set)")
        for name in ("log_prefix", "log_tracker_name", "log_tracker_config", "log_config")
    ),
    NoEffect("keep_tokens", off(*_TAG_CHANGES, *DATASET_FILES), "tags are neither shuffled nor dropped"),
    NoEffect(
        "keep_tokens_separator",
        off(*_TAG_CHANGES, *DATASET_FILES),
        "tags are neither shuffled nor dropped; it is only removed from captions",
    ),
    *(
        NoEffect(name, off("masked_loss", "alpha_mask", *DATASET_FILES), "there are no masks (masked_loss is not set)")
        for name in ("mask_floor", "mask_invert")
    ),
    NoEffect(
        "validation_preview_steps", off("sample_prompts"), "no preview images are drawn (sample_prompts is not set)"
    ),
    *(
        NoEffect(name, off("validation_preview_steps"), "validation_preview_steps is not set")
        for name in ("preview_decoder", "preview_tae", "preview_target")
    ),
    NoEffect("preview_refiner", off("sample_prompts"), "no preview images are drawn (sample_prompts is not set)"),
    NoEffect(
        "preview_refiner",
        both(on("sample_prompts"), off("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")),
        "nothing says when to draw preview images",
    ),
    NoEffect("conditioning_data_dir", off("masked_loss"), "masked_loss is not set"),
    NoEffect("dataset_repeats", _OWN_REPEATS, "it applies to in_json and dataset_config only"),
    NoEffect(
        "skip_cache_check",
        off("cache_latents_to_disk"),
        "no latents are cached on disk (cache_latents_to_disk is not set)",
    ),
    NoEffect(
        "write_inference_yaml",
        is_one_of("save_model_as", "diffusers", "diffusers_safetensors"),
        "a diffusers folder does not need it",
    ),
    *hub_rules.NO_EFFECT,
    *text_encoder_rules.NO_EFFECT,
    *adapter_rules.NO_EFFECT,
    *averaging_rules.NO_EFFECT,
    *update_rules.NO_EFFECT,
    *block_rules.NO_EFFECT,
    *deepspeed_rules.NO_EFFECT,
    *objective_rules.NO_EFFECT,
    *rollout_rules.NO_EFFECT,
    *preservation_rules.NO_EFFECT,
)
