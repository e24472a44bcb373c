"""How fast what learns."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.mistakes import Mistakes
from library.options.optimizer import OptimizerOptions
from library.options.recipes import TrainOptions
from library.training.optimizers import OptimizerChoice
from library.training.plan.adapter import AdapterPlan


@dataclass(frozen=True)
class Rates:
    """Learning rates; None: not trained. `text_encoder_stop`: the text encoder's last optimiser step (None: the
    end)."""

    unet: float | None
    text_encoder: float | None
    text_encoder_stop: int | None


def decide_rates(
    options: TrainOptions, adapter: AdapterPlan | None, optimizer: OptimizerChoice, mistakes: Mistakes
) -> Rates:
    """The rates of the whole model or of an adapter. Rates of 0 are a mistake, unless the optimiser finds its own."""
    rates = model_rates(options.optimizer) if adapter is None else adapter_rates(options, adapter)
    if not rates.unet and not rates.text_encoder and not optimizer.relative_step:
        mistakes.add("--learning_rate 0: nothing would be trained", "give a learning rate above 0")
    return rates


def model_rates(options: OptimizerOptions) -> Rates:
    """The text encoder learns at --learning_rate_te, else --learning_rate; a rate or a stop of 0, or -1, means
    never."""
    stop = options.stop_text_encoder_training
    rate = options.learning_rate if options.learning_rate_te is None else options.learning_rate_te
    if (stop is not None and stop <= 0) or rate == 0:
        return Rates(options.learning_rate, None, None)
    return Rates(options.learning_rate, rate, stop)


def adapter_rates(options: TrainOptions, adapter: AdapterPlan) -> Rates:
    """An adapter's parts learn at --unet_lr and --text_encoder_lr, else at --learning_rate."""
    usual, chosen = options.optimizer.learning_rate, options.adapter
    unet = usual if chosen.unet_lr is None else chosen.unet_lr
    text = chosen.text_encoder_lr[0] if chosen.text_encoder_lr else usual
    return Rates(unet if "unet" in adapter.reaches else None, text if "text_encoder" in adapter.reaches else None, None)
