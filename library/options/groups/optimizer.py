"""Options of the optimizer, learning rates and scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.flag import flag

LR_SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    "adafactor",
    "piecewise_constant",
)


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer, learning rates and scheduler."""

    optimizer_type: str = flag(
        "",
        "Optimizer: AdamW (also when not set), AdamW8bit, PagedAdamW8bit, Lion, Prodigy, Adafactor and others, or "
        "package.module.Class.",
        metadata="ss_optimizer",
    )
    optimizer_args: tuple[str, ...] = flag(
        (),
        "Extra optimizer arguments as key=value, for example weight_decay=0.01 betas=0.9,0.999.",
        pairs=True,
    )
    use_8bit_adam: bool = flag(False, "Same as optimizer_type AdamW8bit.", may_change_on_resume=True)
    use_lion_optimizer: bool = flag(False, "Same as optimizer_type Lion.", may_change_on_resume=True)
    learning_rate: float = flag(
        2e-6, "Learning rate of every module without one of its own.", at_least=0, metadata="ss_learning_rate"
    )
    learning_rate_te: float | None = flag(
        None,
        "Learning rate of the text encoder; not set = learning_rate, 0 = do not train it.",
        at_least=0,
        script="train_db.py",
        neutral_elsewhere=(0.0,),
    )
    learning_rate_te1: float | None = flag(
        None,
        "Learning rate of the first text encoder of Stable Diffusion XL (CLIP ViT-L); not set = learning_rate_te, "
        "0 = do not train it.",
        at_least=0,
        needs="text_encoder_rates",
        script="train_db.py",
        neutral_elsewhere=(0.0,),
    )
    learning_rate_te2: float | None = flag(
        None,
        "Learning rate of the second text encoder of Stable Diffusion XL (OpenCLIP ViT-bigG); not set = "
        "learning_rate_te, 0 = do not train it.",
        at_least=0,
        needs="text_encoder_rates",
        script="train_db.py",
        neutral_elsewhere=(0.0,),
    )
    block_lr: tuple[float, ...] = flag(
        (),
        "Learning rates of the U-Net blocks of Stable Diffusion XL, 23 numbers separated by commas: time and size "
        "embeddings, 9 input blocks, 3 middle blocks, 9 output blocks, output layer; 29 for its refiner, with 12 "
        "input and 12 output blocks.",
        at_least=0,
        needs="block_lr",
        script="train_db.py",
    )
    max_grad_norm: float = flag(
        1.0, "Clip the gradient norm to this value; 0 = off.", at_least=0, metadata="ss_max_grad_norm"
    )
    train_text_encoder: bool = flag(
        True,
        "Train the text encoder too. On by default in train_db.py (--train_text_encoder=false turns it off), off "
        "by default in sdxl_train.py and fine_tune.py, as in sd-scripts.",
        script="train_db.py",
        neutral_elsewhere=(True,),
    )
    stop_text_encoder_training: int | None = flag(
        None,
        "Stop training the text encoder at this optimizer step; 0 or -1 = never train it, not set = train it to "
        "the end.",
        at_least=-1,
        script="train_db.py",
        neutral_elsewhere=(0, -1),
    )
    lr_scheduler: str = flag("constant", "Learning rate scheduler.", choices=LR_SCHEDULERS, metadata="ss_lr_scheduler")
    lr_scheduler_args: tuple[str, ...] = flag(
        (), "Extra scheduler arguments as key=value, for example T_max=100.", pairs=True
    )
    lr_scheduler_type: str = flag(
        "", "Scheduler class as package.module.Class; replaces lr_scheduler and receives lr_scheduler_args."
    )
    lr_warmup_steps: int | float = flag(
        0,
        "Warm up the learning rate over this many optimizer steps, or over a share of all steps such as 0.1; 0 = off.",
        at_least=0,
        metadata="ss_lr_warmup_steps",
    )
    lr_decay_steps: int | float = flag(
        0, "Decay of warmup_stable_decay at the end, in optimizer steps or as a share of all steps.", at_least=0
    )
    lr_scheduler_num_cycles: int = flag(1, "Number of restarts of cosine_with_restarts.", at_least=1, zero_is_off=True)
    lr_scheduler_power: float = flag(1, "Power of the polynomial scheduler.", at_least=0)
    lr_scheduler_timescale: int | None = flag(
        None,
        "Time scale of inverse_sqrt in steps; not set = the number of warm-up steps.",
        at_least=1,
        zero_is_off=True,
    )
    lr_scheduler_min_lr_ratio: float | None = flag(
        None,
        "Minimum learning rate of cosine_with_min_lr and warmup_stable_decay, as a share of the learning rate.",
        at_least=0,
        at_most=1,
    )
