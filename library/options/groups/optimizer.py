"""How weights are changed: optimiser, learning rates and their course."""

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
    """Optimiser and learning rates."""

    optimizer_type: str = flag(
        "",
        "Optimiser: AdamW (also when not set), AdamW8bit, PagedAdamW8bit, Lion, Prodigy, Adafactor and "
        "others, or package.module.Class.",
        metadata="ss_optimizer",
    )
    optimizer_args: tuple[str, ...] = flag(
        (),
        "Further arguments of the optimiser as key=value, for example weight_decay=0.01 betas=0.9,0.999.",
        pairs=True,
    )
    use_8bit_adam: bool = flag(False, "Short for optimizer_type AdamW8bit.", may_change_on_resume=True)
    use_lion_optimizer: bool = flag(False, "Short for optimizer_type Lion.", may_change_on_resume=True)
    learning_rate: float = flag(
        2e-6, "Learning rate of everything that has none of its own.", at_least=0, metadata="ss_learning_rate"
    )
    learning_rate_te: float | None = flag(
        None,
        "Learning rate of the text encoder; not set = learning_rate, 0 = the text encoder is not trained.",
        at_least=0,
        script="train_db.py",
        neutral_elsewhere=(0.0,),
    )
    learning_rate_te1: float | None = flag(
        None,
        "Learning rate of the first text encoder of Stable Diffusion XL (CLIP ViT-L); not set = learning_rate_te, 0 = "
        "it is not trained.",
        at_least=0,
        needs="text_encoder_rates",
        script="train_db.py",
        neutral_elsewhere=(0.0,),
    )
    learning_rate_te2: float | None = flag(
        None,
        "Learning rate of the second text encoder of Stable Diffusion XL (OpenCLIP ViT-bigG); not set = "
        "learning_rate_te, 0 = it is not trained.",
        at_least=0,
        needs="text_encoder_rates",
        script="train_db.py",
        neutral_elsewhere=(0.0,),
    )
    block_lr: tuple[float, ...] = flag(
        (),
        "Learning rates of the blocks of the U-Net of Stable Diffusion XL, 23 numbers with commas between them: "
        "embeddings of time and size, 9 blocks on the way in, 3 in the middle, 9 on the way out, the output; 29 for "
        "its refiner, with 12 on either way.",
        at_least=0,
        needs="block_lr",
        script="train_db.py",
    )
    max_grad_norm: float = flag(
        1.0, "Gradients longer than this are shortened to it; 0 = never.", at_least=0, metadata="ss_max_grad_norm"
    )
    train_text_encoder: bool = flag(
        True,
        "Train the text encoder too. As in sd-scripts, sdxl_train.py and fine_tune.py do so only where this is given; "
        "train_db.py does unless told otherwise (--train_text_encoder=false).",
        script="train_db.py",
        neutral_elsewhere=(True,),
    )
    stop_text_encoder_training: int | None = flag(
        None,
        "Optimiser step at which the text encoder stops learning; 0 or -1 = it is never trained, not set = "
        "it is trained to the end.",
        at_least=-1,
        script="train_db.py",
        neutral_elsewhere=(0, -1),
    )
    lr_scheduler: str = flag(
        "constant", "Course of the learning rate.", choices=LR_SCHEDULERS, metadata="ss_lr_scheduler"
    )
    lr_scheduler_args: tuple[str, ...] = flag(
        (), "Further arguments of the learning-rate scheduler as key=value, for example T_max=100.", pairs=True
    )
    lr_scheduler_type: str = flag(
        "", "Scheduler class as package.module.Class; takes the place of lr_scheduler and gets lr_scheduler_args."
    )
    lr_warmup_steps: int | float = flag(
        0,
        "Warm-up of the learning rate: a whole number of optimiser steps, or a share of all steps such as 0.1.",
        at_least=0,
        metadata="ss_lr_warmup_steps",
    )
    lr_decay_steps: int | float = flag(
        0, "Decay at the end of warmup_stable_decay: a whole number of steps or a share of all steps.", at_least=0
    )
    lr_scheduler_num_cycles: int = flag(1, "Number of restarts of cosine_with_restarts.", at_least=1, zero_is_off=True)
    lr_scheduler_power: float = flag(1, "Power of the polynomial scheduler.", at_least=0)
    lr_scheduler_timescale: int | None = flag(
        None, "Time scale of inverse_sqrt in steps; not set = the length of the warm-up.", at_least=1, zero_is_off=True
    )
    lr_scheduler_min_lr_ratio: float | None = flag(
        None,
        "Lowest learning rate of cosine_with_min_lr and warmup_stable_decay, as a share of the learning rate.",
        at_least=0,
        at_most=1,
    )
