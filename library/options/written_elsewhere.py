"""Names and values that users bring from other places, and what to write here instead.

They come from the arguments of networks and optimizers, the fields of front-ends, other trainers, and accelerate.
Data only, but for `way_out`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# Name -> (flag, key): an argument of the network or the optimizer. Front-ends have fields of other names for some.
_ARGUMENTS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        **{
            name: ("network_args", name)
            for name in (
                "algo", "block_alphas", "block_dims", "block_lr_zero_threshold", "constraint", "conv_alpha",
                "conv_block_alphas", "conv_block_dims", "conv_dim", "decompose_both", "dora_wd", "down_lr_weight",
                "enable_all", "enable_all_linear", "enable_conv", "factor", "full_matrix",
                "loraplus_lr_ratio", "loraplus_text_encoder_lr_ratio", "loraplus_unet_lr_ratio", "mid_lr_weight",
                "module_dropout", "preset", "rank_dropout", "train_norm", "train_on_input",
                "unbalanced_factorization", "unit", "up_lr_weight", "use_dora", "use_rslora", "use_tucker",
                "wd_on_output",
            )
        },
        "dylora_unit": ("network_args", "unit"),
        "lokr_factor": ("network_args", "factor"),
        "lycoris_algo": ("network_args", "algo"),
        **{
            name: ("optimizer_args", name)
            for name in (
                "betas", "d0", "d_coef", "decouple", "eps", "growth_rate", "momentum", "relative_step",
                "safeguard_warmup", "scale_parameter", "use_bias_correction", "warmup_init", "weight_decay",
            )
        },
        "adam_epsilon": ("optimizer_args", "eps"),
        "adam_weight_decay": ("optimizer_args", "weight_decay"),
        "prodigy_d0": ("optimizer_args", "d0"),
        "prodigy_d_coef": ("optimizer_args", "d_coef"),
    }
)  # fmt: skip

# Name -> the flag with the same meaning.
_FLAGS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("dim", "rank", "lora_dim", "lora_rank", "network_rank"), "network_dim"),
        **dict.fromkeys(("alpha", "lora_alpha"), "network_alpha"),
        **dict.fromkeys(("dropout", "lora_dropout"), "network_dropout"),
        **dict.fromkeys(("base_model", "ckpt", "model", "pretrained_model"), "pretrained_model_name_or_path"),
        **dict.fromkeys(("image_dir", "instance_data_dir"), "train_data_dir"),
        **dict.fromkeys(("epochs", "max_epochs", "num_epochs", "num_train_epochs"), "max_train_epochs"),
        **dict.fromkeys(("max_steps", "steps"), "max_train_steps"),
        **dict.fromkeys(("grad_accum", "gradient_accumulation"), "gradient_accumulation_steps"),
        "batch_size": "train_batch_size",
        "checkpointing_steps": "save_every_n_steps",
        "class_data_dir": "reg_data_dir",
        "instance_prompt": "class_tokens",
        "log_dir": "logging_dir",
        "lr": "learning_rate",
        "optimizer": "optimizer_type",
        "precision": "mixed_precision",
        "resume_from_checkpoint": "resume",
        "scheduler": "lr_scheduler",
        "snr_gamma": "min_snr_gamma",
    }
)

_OF_ACCELERATE = frozenset(
    {
        "dynamo_mode", "dynamo_use_dynamic", "dynamo_use_fullgraph", "gpu_ids", "machine_rank", "main_process_ip",
        "main_process_port", "multi_gpu", "num_cpu_threads_per_process", "num_machines", "num_processes",
        "rdzv_backend", "same_network", "use_deepspeed", "use_fsdp",
    }
)  # fmt: skip

_SENTENCES: Mapping[str, str] = MappingProxyType(
    {
        "adam_beta1": "write --optimizer_args betas=0.9,0.999",
        "adam_beta2": "write --optimizer_args betas=0.9,0.999",
        "network_args_custom": "write its members into network_args",
        "optimizer_args_custom": "write its members into optimizer_args",
        "text_encoder_lr1": "write --text_encoder_lr with one value for each text encoder: --text_encoder_lr 5e-5 2e-5",
        "text_encoder_lr2": "write --text_encoder_lr with one value for each text encoder: --text_encoder_lr 5e-5 2e-5",
        "width": "write --resolution width,height, such as --resolution 512,768",
        "height": "write --resolution width,height, such as --resolution 512,768",
    }
)


def argument_of(name: str) -> tuple[str, str] | None:
    """(flag, key) of an argument of the network or the optimizer: ("network_args", "conv_dim") for conv_dim."""
    return _ARGUMENTS.get(name)


def way_out(name: str, text: str, *, in_file: bool) -> str:
    """What to write instead of an unknown flag, or of an unknown key of a file, with its value; "" if not known."""
    name = name.replace("-", "_")
    if name in _OF_ACCELERATE:
        where = "it belongs to accelerate launch, not into a file" if in_file else "it belongs to accelerate launch"
        return f"{where}: write it before the name of the program, or remove it"
    if name in _SENTENCES:
        return _SENTENCES[name]
    if name in _ARGUMENTS:
        flag, key = _ARGUMENTS[name]
        pair = f"{key}={text.replace(' ', ',') or '...'}"
        return f'write {flag} = ["{pair}"]' if in_file else f"write --{flag} {pair}"
    if name in _FLAGS:
        return f"write {_FLAGS[name]}" if in_file else f"write --{_FLAGS[name]} {text}".rstrip()
    return ""
