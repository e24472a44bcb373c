"""Options of validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from library.options.flag import flag


@dataclass(frozen=True)
class ValidationOptions:
    """How many images are held out, and when the loss on them and others is computed."""

    may_change_on_resume: ClassVar[bool] = True  # held-out images already change the training data, which is compared

    validation_split: float = flag(
        0.0,
        "Share of the images held out from training, 0 to 1; the loss on them shows whether the model learns or "
        "memorises.",
        at_least=0,
        at_most=1,
        metadata="ss_validation_split",
    )
    validation_seed: int | None = flag(
        None,
        "Seed for choosing the held-out images; not set = seed.",
        at_least=0,
        too_low="leave --validation_seed out to use --seed",
        metadata="ss_validation_seed",
    )
    validate_every_n_steps: int | None = flag(
        None,
        "Compute the validation loss every n steps; 0 = off.",
        at_least=1,
        zero_is_off=True,
        metadata="ss_validate_every_n_steps",
    )
    validate_every_n_epochs: int | None = flag(
        None,
        "Compute the validation loss every n epochs; not set = 1 with held-out images, unless validate_every_n_steps "
        "is set.",
        at_least=1,
        zero_is_off=True,
        metadata="ss_validate_every_n_epochs",
    )
    keep_best: str | None = flag(
        None,
        "Keep the checkpoint with the best METRIC as NAME_best, beside the last one: validation_loss, "
        "validation_divergence, training_loss, class_loss (with _ema: of the EMA), dino, clip_i, clip_t, "
        "clip_score, div_dino, pres.",
    )
    early_stop: str | None = flag(
        None,
        "End the run once METRIC was measured PATIENCE times without becoming better, written METRIC:PATIENCE, such as "
        "validation_loss:3.",
    )
    max_validation_steps: int | None = flag(
        None,
        "Maximum number of batches of each set of images per validation; 0 = all held-out images.",
        at_least=1,
        zero_is_off=True,
        metadata="ss_max_validation_steps",
    )
