"""What the user asked for and no other line of a plan says: options by their names, rendered from the flags and from
the keys of dataset files."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from library.data.scan.dataset_specs import from_flags
from library.messages import shortened
from library.options.dataset_config.keys import KEYS
from library.options.datasets import DatasetSpec, SubsetSpec
from library.options.train_options import FLAGS, TrainOptions, values_of

Values = Mapping[str, object]


def _always(values: Values) -> bool:
    return True


def _with(*flags: str) -> Callable[[Values], bool]:
    """Said where one of these flags is on."""
    return lambda values: any(values[flag] for flag in flags)


def _by_inference(values: Values) -> bool:
    return bool(values["scheduled_sampling_max_step_offset"]) and values["scheduled_sampling_stride"] == "inference"


def _masked(values: Values) -> bool:
    return bool(values["alpha_mask"]) or bool(values["masked_loss"])


def _huber(values: Values) -> bool:
    return values["loss_type"] in ("huber", "smooth_l1")


def _biased(values: Values) -> bool:
    return values["timestep_bias_strategy"] != "none"


# Flag -> whether another line of the plan says its value. All others are listed by name as soon as they are set.
SAID: Mapping[str, Callable[[Values], bool]] = {
    # what a run does, rather than how
    **dict.fromkeys(("dry_run", "output_config", "debug_dataset", "config_file"), _always),
    # model
    **dict.fromkeys(("pretrained_model_name_or_path", "vae", "v2", "v_parameterization", "max_token_length"), _always),
    # data and buckets
    **dict.fromkeys(("train_data_dir", "reg_data_dir", "class_tokens", "num_repeats", "dataset_repeats"), _always),
    **dict.fromkeys(("resolution", "train_batch_size", "max_data_loader_n_workers"), _always),
    # captions
    **dict.fromkeys(("caption_prefix", "caption_suffix", "enable_wildcard", "shuffle_caption"), _always),
    **dict.fromkeys(("caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate"), _always),
    "token_warmup_step": _always,
    "token_warmup_min": _with("token_warmup_step"),
    **dict.fromkeys(("keep_tokens", "keep_tokens_separator"), _with("shuffle_caption", "caption_tag_dropout_rate")),
    # training: adapter, learning rates, optimizer
    **dict.fromkeys(("network_module", "network_args", "network_weights"), _always),
    **dict.fromkeys(("base_weights", "base_weights_multiplier"), _always),
    **dict.fromkeys(("network_train_unet_only", "network_train_text_encoder_only"), _always),
    **dict.fromkeys(("unet_lr", "text_encoder_lr", "learning_rate", "block_lr"), _always),
    **dict.fromkeys(("learning_rate_te", "learning_rate_te1", "learning_rate_te2"), _always),
    **dict.fromkeys(("train_text_encoder", "stop_text_encoder_training"), _always),
    **dict.fromkeys(("optimizer_type", "optimizer_args", "use_8bit_adam", "use_lion_optimizer"), _always),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "lr_warmup_steps"), _always),
    **dict.fromkeys(("initial_epoch", "initial_step"), _always),
    # training: loss
    "masked_loss": _masked,
    **dict.fromkeys(("mask_floor", "mask_invert", "mask_normalise"), _masked),
    "loss_type": _always,
    **dict.fromkeys(("huber_schedule", "huber_c", "huber_scale"), _huber),
    "min_snr_gamma": _always,
    "noise_offset": _always,
    **dict.fromkeys(("noise_offset_random_strength", "adaptive_noise_scale"), _with("noise_offset")),
    "multires_noise_iterations": _always,
    **dict.fromkeys(("multires_noise_discount", "multires_noise_scaling"), _with("multires_noise_iterations")),
    "ip_noise_gamma": _always,
    "ip_noise_gamma_random_strength": _with("ip_noise_gamma"),
    **dict.fromkeys(("min_timestep", "max_timestep", "timestep_bias_strategy"), _always),
    **dict.fromkeys(("timestep_bias_multiplier", "timestep_bias_portion"), _biased),
    **dict.fromkeys(("timestep_bias_begin", "timestep_bias_end"), _biased),
    "zero_terminal_snr": _always,
    **{name: _with("scheduled_sampling_max_step_offset") for name in FLAGS if name.startswith("scheduled_sampling_")},
    "scheduled_sampling_inference_steps": _by_inference,
    # length, images, validation
    **dict.fromkeys(("max_train_steps", "max_train_epochs", "seed", "resume", "gradient_accumulation_steps"), _always),
    "sample_prompts": _with("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first"),
    **dict.fromkeys(("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first"), _with("sample_prompts")),
    "preview_refiner": _with("sample_prompts"),
    "validation_preview_steps": _with("sample_prompts"),
    **dict.fromkeys(("preview_decoder", "preview_tae", "preview_target"), _with("validation_preview_steps")),
    **dict.fromkeys(("validation_split", "validate_every_n_steps", "validate_every_n_epochs"), _always),
    **dict.fromkeys(("keep_best", "early_stop"), _always),
    # how weights are updated
    **dict.fromkeys(("fused_backward_pass", "fused_optimizer_groups"), _always),
    "fused_backward_clipping": _with("fused_backward_pass", "fused_optimizer_groups"),
    "bf16_rounding": lambda values: bool(values["full_bf16"]) and values["bf16_rounding"] != "nearest",
    # machine
    **dict.fromkeys(("mixed_precision", "full_fp16", "full_bf16"), _always),
    **dict.fromkeys(("xformers", "diffusers_xformers", "sdpa", "mem_eff_attn"), _always),
    # files
    **dict.fromkeys(("output_dir", "output_name", "use_safetensors"), _always),
    "save_model_as": lambda values: not str(values["save_model_as"]).startswith("diffusers"),
    **dict.fromkeys(("save_every_n_epochs", "save_every_n_steps", "save_n_epoch_ratio"), _always),
    **dict.fromkeys(("save_state", "save_state_on_train_end"), _always),
    **dict.fromkeys(("logging_dir", "log_with"), _always),
    **dict.fromkeys(("huggingface_repo_id", "huggingface_repo_type", "huggingface_path_in_repo"), _always),
    **dict.fromkeys(("huggingface_repo_visibility", "async_upload", "save_state_to_huggingface"), _always),
}

# Keys of dataset files that have no flag of their name, and that the line of the subset says.
SAID_OF_SUBSETS = ("image_dir", "metadata_file", "is_reg", "validation")


def given_options(options: TrainOptions, given: Collection[str], but: Collection[str] = ()) -> Iterator[str]:
    """One line with the options that were given, have a meaning of their own, and are in no other line.

    `given`: names of the options that differ from the defaults of the program. `but`: more that other lines say.
    """
    values = values_of(options)
    texts = [
        _named(name, values[name], secret=FLAGS[name].secret)
        for name in values
        if name in given and name not in but and not SAID.get(name, _never)(values)
    ]
    if texts:
        yield ", ".join(texts)


def _never(values: Values) -> bool:
    return False


def subset_settings(subset: SubsetSpec, options: TrainOptions) -> str:
    """The settings of a subset that the flags do not say: ", flip_aug, caption_separator ;", or nothing."""
    template = from_flags(options.dataset, options.caption, options.mask, options.validation).subsets[0]
    records = {"subset": (subset, template), "captions": (subset.captions, template.captions)}
    return _differing(records | {"images": (subset.images, template.images)})


def dataset_settings(dataset: DatasetSpec, options: TrainOptions) -> str:
    """The settings of a dataset that the flags do not say, like those of a subset."""
    template = from_flags(options.dataset, options.caption, options.mask, options.validation)
    return _differing({"dataset": (dataset, template), "buckets": (dataset.buckets, template.buckets)})


def _differing(records: Mapping[str, tuple[object, object]]) -> str:
    """The keys whose value in the first of two records is another one than in the second."""
    places = {key.name: (key.target or "").split(".") for key in KEYS.values() if key.target}
    both = {
        name: [getattr(each, attribute) for each in records[record]]
        for name, (record, attribute) in places.items()
        if record in records
    }
    own = {name: values[0] for name, values in both.items()}
    return "".join(
        f", {_named(name, _as_written(name, value))}"
        for name, (value, by_flags) in both.items()
        if value != by_flags and name not in SAID_OF_SUBSETS and not SAID.get(name, _never)(own)
    )


def _as_written(name: str, value: object) -> object:
    """A colour as dataset files write it."""
    if name == "background" and isinstance(value, tuple):
        return "#" + bytes(value).hex()
    return value


def _named(name: str, value: object, *, secret: bool = False) -> str:
    """`flip_aug`, `max_grad_norm 0`, `train_text_encoder off`."""
    if secret:
        return f"{name} (not shown)"
    if isinstance(value, bool):
        return name if value else f"{name} off"
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    elif isinstance(value, float):
        value = f"{value:g}"
    text = str(value)
    if not isinstance(value, Path):
        text = shortened(re.sub(r"//[^/@\s]*@", "//", text))
    return f"{name} {text}" if text and " " not in text and "," not in text else f'{name} "{text}"'
