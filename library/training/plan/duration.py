"""The length of a run in optimizer steps and epochs, and the option that sets it."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from library.options.groups.run import RunOptions

PASSES_OF_A_SAMPLE = 3
"""Forward passes that take as long as training on a sample: a backward pass takes as long as two."""


@dataclass(frozen=True)
class Duration:
    """`steps` optimizer steps in `epochs` epochs of `steps_per_epoch`; `reason` names the option that set it."""

    steps: int
    epochs: int
    steps_per_epoch: int
    batches_per_epoch: int
    reason: str


def ends_epoch(step: int, window: int, steps: int | None, steps_per_epoch: int, *, epoch_ended: bool) -> bool:
    """Whether an epoch ends after `step` of `steps` optimizer steps, `window` of them in this epoch: what is due after
    epochs is due after an incomplete last one, too. `epoch_ended`: see loop.DueCall."""
    return epoch_ended or (steps is not None and step >= steps and window < steps_per_epoch)


def decide_duration(
    options: RunOptions, given: Collection[str], steps_per_epoch: int, batches_per_epoch: int
) -> Duration:
    """--max_train_epochs overrides --max_train_steps; the default of 1600 steps applies if neither is given.

    `given`: names of the options that the user set.
    """
    if options.max_train_epochs:
        epochs = options.max_train_epochs
        reason = "--max_train_epochs"
        if "max_train_steps" in given:
            reason += f", which overrides --max_train_steps {options.max_train_steps}"
        return Duration(epochs * steps_per_epoch, epochs, steps_per_epoch, batches_per_epoch, reason)
    steps = options.max_train_steps
    reason = (
        "--max_train_steps"
        if "max_train_steps" in given
        else "the default; set --max_train_steps or --max_train_epochs"
    )
    return Duration(steps, math.ceil(steps / steps_per_epoch), steps_per_epoch, batches_per_epoch, reason)
