"""Keys of SimpleTuner's config.json: the flag that each one is here, or what to use instead. Data only.

Names, values and defaults are those of its documentation/OPTIONS.md and field registry. Keys that only have a meaning
together (optimizer, schedule, checkpoints, text encoder) are read by `simpletuner_config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class Key:
    """One key. `flag`: the flag with the same meaning; `reads`: values that are spelt otherwise here (None: not set).

    Without a flag every value but off and the `neutral` ones is a mistake, with the `remedy`, unless one of the flags
    `instead` is on the command line. `only_with`: the key ("key" or "key=value") without which this one has no effect.
    """

    flag: str = ""
    reads: Mapping[object, object] = field(default_factory=lambda: MappingProxyType({}))
    neutral: tuple[object, ...] = ()
    remedy: str = ""
    instead: tuple[str, ...] = ()
    only_with: str = ""


def _refused(remedy: str, *neutral: object, instead: tuple[str, ...] = (), only_with: str = "") -> Key:
    return Key(neutral=neutral, remedy=remedy, instead=instead, only_with=only_with)


_NOT_HERE = "remove it"
_IN_ENTRIES = "write it into the entries of the data_backend_config"

_FLAGS: Mapping[str, Key] = MappingProxyType(
    {
        # Flags of the same name and values; those of the optimizer, the run and the weights.
        **{
            name: Key(name)
            for name in (
                "data_aesthetic_score", "data_backend_config", "ema_decay", "ema_device", "ema_update_interval",
                "ema_validation", "ema_warmup_steps", "gradient_accumulation_steps", "gradient_checkpointing",
                "huber_c", "huber_schedule", "learning_rate", "loss_type", "lr_warmup_steps", "max_train_steps",
                "mixed_precision", "output_dir", "pretrained_model_name_or_path", "refiner_training_invert_schedule",
                "refiner_training_strength", "timestep_bias_begin", "timestep_bias_end", "timestep_bias_multiplier",
                "timestep_bias_portion", "timestep_bias_strategy", "train_batch_size", "use_ema", "vae_batch_size",
                "webhook_config",
                "scheduled_sampling_max_step_offset", "scheduled_sampling_prob_end", "scheduled_sampling_prob_start",
                "scheduled_sampling_probability",
                "scheduled_sampling_ramp_shape", "scheduled_sampling_ramp_steps", "scheduled_sampling_sampler",
                "scheduled_sampling_start_step", "scheduled_sampling_strategy",
            )
        },
        **{
            name: Key(name, {"no_change": None})  # also written for whole models, which are not quantised
            for name in (
                "base_model_precision", "text_encoder_1_precision", "text_encoder_2_precision",
                "text_encoder_3_precision",
            )
        },
        "aspect_bucket_alignment": Key("bucket_reso_steps"),
        "caption_dropout_probability": Key("caption_dropout_rate"),
        "checkpoint_epoch_interval": Key("save_every_n_epochs"),
        "eval_epoch_interval": Key("validate_every_n_epochs"),
        "eval_steps_interval": Key("validate_every_n_steps"),
        "init_lora": Key("network_weights", only_with="model_type=lora"),
        "input_perturbation": Key("ip_noise_gamma"),
        "lora_alpha": Key("network_alpha", only_with="model_type=lora"),
        "lora_rank": Key("network_dim", only_with="model_type=lora"),
        "lr_num_cycles": Key("lr_scheduler_num_cycles"),
        "lr_power": Key("lr_scheduler_power"),
        "num_eval_images": Key("max_validation_steps"),  # it counts batches there too
        "num_train_epochs": Key("max_train_epochs"),
        "resolution": Key("resolution", only_with="resolution_type=pixel_area"),
        "prediction_type": Key("v_parameterization", {"epsilon": False, "v_prediction": True}),
        "pretrained_vae_model_name_or_path": Key("vae"),
        "rescale_betas_zero_snr": Key("zero_terminal_snr"),
        "seed": Key("seed", {0: None, -1: None}),  # both mean a new seed each time
        "snr_gamma": Key("min_snr_gamma"),
        "tracker_project_name": Key("log_tracker_name"),
        "validation_epoch_interval": Key("sample_every_n_epochs", only_with="validation_prompt"),
        "validation_noise_scheduler": Key(
            "sample_sampler",
            {"euler-a": "euler_a", "dpm++": "dpmsolver++", "ddpm": None},
            only_with="validation_prompt",
        ),
        "validation_preview_steps": Key("validation_preview_steps", only_with="validation_preview"),
        **dict.fromkeys(
            ("validation_steps", "validation_step_interval"), Key("sample_every_n_steps", only_with="validation_prompt")
        ),
        "tracker_run_name": Key("wandb_run_name"),
    }
)  # fmt: skip

_REFUSED: Mapping[str, Key] = MappingProxyType(
    {
        # data
        "caption_strategy": _refused(_IN_ENTRIES, "filename"),
        "crop": _refused(_IN_ENTRIES),
        "crop_aspect": _refused(_IN_ENTRIES, only_with="crop"),
        "crop_style": _refused(_IN_ENTRIES, only_with="crop"),
        "data_backend_sampling": _refused("remove it: repeats decide how often an image appears", "auto-weighting"),
        "instance_prompt": _refused(_IN_ENTRIES),
        "max_upscale_threshold": _refused("skip small images with minimum_image_size"),
        "maximum_image_size": _refused(_IN_ENTRIES, 0),
        "minimum_image_size": _refused(_IN_ENTRIES, 0),
        "only_instance_prompt": _refused(_IN_ENTRIES),
        "prepend_instance_prompt": _refused(_IN_ENTRIES),
        "resolution_type": _refused(f"{_IN_ENTRIES}, together with resolution", "pixel_area"),
        "target_downsample_size": _refused(_IN_ENTRIES, only_with="maximum_image_size"),
        "tokenizer_max_length": _refused("set --max_token_length", instead=("max_token_length",)),
        "eval_loss_disable": _refused('add "disabled": true to the entries of dataset_type eval, or remove it'),
        # model and adapter
        "control": _refused(_NOT_HERE),
        "controlnet": _refused(_NOT_HERE),
        "init_lokr_norm": _refused(_NOT_HERE, only_with="lora_type=lycoris"),
        "layer_freeze_strategy": _refused(_NOT_HERE, "none"),
        "lora_dropout": _refused(
            "set --network_dropout, which drops between the two matrices instead of before the first",
            0,
            instead=("network_dropout",),
            only_with="model_type=lora",
        ),
        "lora_init_type": _refused(
            'for "pissa" write --network_args init=pissa',
            "default",
            instead=("network_args",),
            only_with="model_type=lora",
        ),
        "model_family": _refused(
            "use a model of Stable Diffusion 1, 2 or XL; the family is read from its file",
            "legacy", "sd1x", "sd2x", "sdxl",
        ),
        "peft_lora_mode": _refused(_NOT_HERE, "standard", only_with="model_type=lora"),
        "peft_lora_target_modules": _refused(
            "choose blocks with --network_args block_dims", instead=("network_args",), only_with="model_type=lora"
        ),
        "refiner_training": _refused("remove it: the refiner is known by its file and trained as one"),
        "sdxl_refiner_uses_full_range": _refused("set --refiner_training_strength 1"),
        "text_encoder_4_precision": _refused(_NOT_HERE, "no_change"),
        "use_dora": _refused(
            "write --network_args use_dora=True wd_on_output=True",
            instead=("network_args",),
            only_with="model_type=lora",
        ),
        # loss
        "diff2flow_enabled": _refused(_NOT_HERE),
        "distillation_config": _refused(_NOT_HERE, only_with="distillation_method"),
        "distillation_method": _refused(_NOT_HERE),
        "input_perturbation_steps": _refused("remove it: --ip_noise_gamma is the same in every step", 0),
        "masked_loss_probability": _refused("remove it: masks are always used", 1),
        "offset_noise": _refused(
            "set --noise_offset, which applies to every sample instead of a share of the batches",
            instead=("noise_offset",),
        ),
        "scheduled_sampling_order": _refused(_NOT_HERE, 2, only_with="scheduled_sampling_max_step_offset"),
        "scheduled_sampling_reflexflow": _refused(_NOT_HERE, only_with="scheduled_sampling_max_step_offset"),
        "sla_config": _refused(_NOT_HERE),
        "tread_config": _refused(_NOT_HERE),
        "use_soft_min_snr": _refused("set --min_snr_gamma", instead=("min_snr_gamma",)),
        # optimizer, precision
        **{
            name: _refused("write it into optimizer_config", default)
            for name, default in (
                ("adam_beta1", 0.9), ("adam_beta2", 0.999), ("adam_epsilon", 1e-8), ("adam_weight_decay", 0.01),
            )
        },
        "freeze_encoder_strategy": _refused(_NOT_HERE, only_with="train_text_encoder"),
        "grad_clip_method": _refused(
            'write "norm", or set --max_grad_norm: gradients are clipped by their norm here',
            "norm",
            instead=("max_grad_norm",),
        ),
        "lr_scale": _refused("multiply the learning_rate yourself"),
        "prodigy_steps": _refused(_NOT_HERE, 0, only_with="optimizer=prodigy"),
        "quantization_config": _refused("set --base_model_precision", instead=("base_model_precision",)),
        "quantize_activations": _refused(_NOT_HERE),
        "text_encoder_limit": _refused(
            "set --stop_text_encoder_training",
            instead=("stop_text_encoder_training",),
            only_with="train_text_encoder",
        ),
    }
)  # fmt: skip

KEYS: Mapping[str, Key] = MappingProxyType({**_FLAGS, **_REFUSED})

IGNORED = frozenset(
    {
        # without effect on the trained weights: uploads, caches, speed, memory
        "accelerator_cache_clear_interval", "aspect_bucket_disable_rebuild", "aspect_bucket_rounding",
        "aspect_bucket_worker_count", "aws_max_pool_connections", "base_model_default_dtype",
        "cache_clear_validation_prompts", "cache_dir", "cache_dir_text", "cache_dir_vae",
        "checkpointing_rolling_steps", "checkpointing_use_tempdir", "checkpoints_rolling_total_limit",
        "compress_disk_cache", "delete_problematic_images", "delete_unwanted_images", "disable_benchmark",
        "disable_bucket_pruning", "disable_segmented_timestep_sampling", "disable_tf32", "ema_cpu_only",
        "ema_foreach_disable", "enable_group_offload", "enable_multiprocessing", "enable_watermark",
        "eval_dataset_pooling", "eval_timesteps",
        "evaluation_type", "framerate", "fully_unload_text_encoder", "fuse_optimizer", "fuse_qkv_projections",
        "fused_qkv_projections", "gradient_checkpointing_backend", "gradient_checkpointing_interval",
        "gradient_precision", "i_know_what_i_am_doing", "ignore_final_epochs", "ignore_missing_files",
        "image_processing_batch_size", "inference_scheduler_timestep_spacing", "keep_vae_loaded", "local_rank",
        "lr_scale_sqrt", "max_workers", "metadata_update_interval", "model_flavour", "modelspec_comment",
        "non_ema_revision", "num_validation_images", "offload_during_save",
        "offload_during_startup", "optimizer_cpu_offload_method", "optimizer_offload_gradients",
        "optimizer_release_gradients", "override_dataset_config", "post_checkpoint_script", "post_upload_script",
        "preserve_data_backend_cache", "pretrained_evaluation_model_name_or_path", "print_filenames",
        "print_sampler_statistics", "publishing_config", "quantize_via", "read_batch_size", "revision",
        "sageattention_usage", "save_text_encoder", "seed_for_each_device", "set_grads_to_none",
        "skip_file_discovery", "snr_weight", "torch_num_threads", "tracker_image_layout",
        "training_scheduler_timestep_spacing", "unet_attention_slice", "user_prompt_library", "vae_dtype", "variant",
        "write_batch_size",
        # only with a key that is answered on its own
        "controlnet_custom_config", "controlnet_model_name_or_path", "diff2flow_loss", "freeze_encoder",
        "freeze_encoder_after", "freeze_encoder_before", "noise_offset", "noise_offset_probability",
        "singlora_ramp_up_steps", "soft_min_snr_sigma_data",
        # names of flags here, with another meaning there
        "validation_seed",
    }
)  # fmt: skip

IGNORED_PREFIXES = (
    "vae_cache_", "vae_enable_", "dataloader_", "debug_", "fsdp_", "group_offload_", "hub_", "model_card_",
    "musubi_", "parquet_", "push_", "ramtorch", "scheduled_sampling_reflexflow_", "validation_", "webhook_",
    # of families that are not trained here
    "crepa_", "flow_", "flux_", "hidream_", "ltx_", "sana_", "sd3_", "t5_",
)  # fmt: skip

# Setting of the prompt there -> the letter of the same one in a line of prompts here.
PROMPT_OPTIONS: Mapping[str, str] = MappingProxyType(
    {"validation_num_inference_steps": "s", "validation_guidance": "l", "validation_seed": "d"}
)

# Optimizer there -> optimizer here and the arguments that it has there; the same algorithm.
_ADAM = {"weight_decay": "0.01", "eps": "1e-6"}
OPTIMIZERS: Mapping[str, tuple[str, Mapping[str, str]]] = MappingProxyType(
    {
        "adamw_bf16": ("AdamW", _ADAM),
        "bnb-adamw-paged": ("PagedAdamW", _ADAM),
        "bnb-adamw8bit": ("AdamW8bit", _ADAM),
        "bnb-adamw8bit-paged": ("PagedAdamW8bit", _ADAM),
        "bnb-lion8bit": ("Lion8bit", {}),
        "bnb-lion8bit-paged": ("PagedLion8bit", {}),
        "torch-adamw": ("AdamW", {"weight_decay": "0.01"}),
    }
)

LR_END = "4e-7"  # where polynomial ends there by default

# Key -> its default there, where that trains other weights than the default here.
DEFAULTS: Mapping[str, str] = MappingProxyType(
    {
        "learning_rate": "4e-7",
        "lr_scheduler": "constant_with_warmup",
        "mixed_precision": "bf16",
        "train_batch_size": "4",
        "train_text_encoder": "false",
        "max_grad_norm": "2 by value",
        "lora_rank": "16",
        "lora_alpha": "lora_rank",
        "lora_dropout": "0.1",
        "ema_decay": "0.995",
    }
)
