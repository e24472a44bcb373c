"""Options of the averages of the weights (EMA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from library.options.flag import flag

EmaOf = Literal["weights", "delta"]
EmaSave = Literal["both", "only", "none"]
EmaValidation = Literal["none", "ema_only", "comparison"]


@dataclass(frozen=True)
class AveragingOptions:
    """What is averaged over the steps of a run, and what the average is used for."""

    use_ema: bool = flag(False, "Keep an exponential moving average (EMA) of the trained weights, in float32.")
    ema_of: EmaOf = flag(
        "weights",
        "What is averaged of an adapter: weights = each of its tensors by itself; delta = ΔW of a LoRA, kept as whole "
        "matrices, from which factors of its rank are made by their singular values.",
        choices=get_args(EmaOf),
        script="train_network.py",
    )
    ema_decay: float | None = flag(
        None,
        "Weight of the average in one step, such as 0.999; the weights in training have the rest. Not set = from "
        "ema_horizon.",
        at_least=0,
        below=1,
    )
    ema_horizon: int | float | None = flag(
        None,
        "Mean age of the averaged weights, in steps or as a share of all steps: decay = horizon / (horizon + 1). "
        "Not set = 0.1 of all steps, unless ema_decay is set.",
        above=0,
    )
    ema_update_interval: int = flag(
        1,
        "Update the averages every n steps, with the decay of n steps: ema_decay to the power of n.",
        at_least=1,
    )
    ema_warmup_steps: int | float = flag(
        0,
        "The average only follows the weights for this many steps, or for a share of all steps such as 0.1.",
        at_least=0,
    )
    ema_device: str = flag(
        "cpu",
        "Where the averages are kept: in CPU memory, or with the model on the accelerator, which is faster.",
        choices=("cpu", "accelerator"),
        may_change_on_resume=True,
    )
    ema_save: EmaSave = flag(
        "both",
        "What is saved: both = the weights in training, and the average in a second file whose name ends in _ema; "
        "only = the average, under that name; none = the weights in training.",
        choices=get_args(EmaSave),
        may_change_on_resume=True,
    )
    ema_validation: EmaValidation = flag(
        "comparison",
        "What sample images are drawn with and the validation loss is computed of: none = the weights in training, "
        "ema_only = the average, comparison = both.",
        choices=get_args(EmaValidation),
        may_change_on_resume=True,
    )
    posthoc_ema_snapshots: int | None = flag(
        None,
        "Post-hoc EMA: keep two averages of relative width 0.05 and 0.1, and save both this many times, evenly over "
        "the run and last at its end, into the folder NAME-posthoc_ema. tools/posthoc_ema.py makes an average of any "
        "width out of them. 0 = off.",
        at_least=1,
        zero_is_off=True,
    )
