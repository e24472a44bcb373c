"""Learning rates per module and block, and what they are used by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from library.families.family import Family
from library.options.groups.optimizer import OptimizerOptions
from library.options.mistakes import Mistakes
from library.options.train_options import TrainOptions
from library.training.adapter.plan import AdapterPlan
from library.training.optim.optimizers import OptimizerChoice
from library.training.optim.schedules import ScheduleChoice


@dataclass(frozen=True)
class LearningRates:
    """Learning rates of the modules that are trained, by name: the backbone, then the text encoders in the family's
    order. `text_encoder_stop` is the text encoders' last optimiser step (None: the end). `blocks`: of each block of the
    backbone, in place of its rate in `modules`; 0: not trained."""

    modules: Mapping[str, float]
    text_encoder_stop: int | None = None
    blocks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Optimization:
    """How the weights are updated."""

    learning_rates: LearningRates
    optimizer: OptimizerChoice
    schedule: ScheduleChoice


def decide_learning_rates(
    options: TrainOptions,
    family: Family,
    adapter: AdapterPlan | None,
    optimizer: OptimizerChoice,
    mistakes: Mistakes,
    notes: list[str],
) -> LearningRates:
    """The rates of the whole model or of an adapter. Rates of 0 are a mistake, unless the optimiser finds its own."""
    if adapter is None:
        rates = model_rates(options.optimizer, family)
        check_blocks(options.optimizer.block_lr, family, optimizer, mistakes)
    else:
        rates = adapter_rates(options, family, adapter)
        check_text_rates(options.adapter.text_encoder_lr, family, notes)
    if not any((*rates.modules.values(), *rates.blocks)) and not optimizer.relative_step:
        mistakes.add("--learning_rate 0: nothing would be trained", "give a learning rate above 0")
    return rates


def model_rates(options: OptimizerOptions, family: Family) -> LearningRates:
    """Text encoders learn at --learning_rate_te1 and _te2, else --learning_rate_te, else --learning_rate; a rate or a
    stop of 0, or -1, means never."""
    stop, blocks = options.stop_text_encoder_training, options.block_lr
    backbone = {family.backbone: options.learning_rate}
    if not options.train_text_encoder or (stop is not None and stop <= 0):
        return LearningRates(backbone, None, blocks)
    shared = options.learning_rate if options.learning_rate_te is None else options.learning_rate_te
    own = (options.learning_rate_te1, options.learning_rate_te2)
    if "text_encoder_rates" not in family.capabilities:
        own = (None, None)
    rates = [shared if rate is None else rate for _, rate in zip(family.text_encoders, own, strict=False)]
    named = {name: rate for name, rate in zip(family.text_encoders, rates, strict=True) if rate != 0}
    return LearningRates(backbone | named, stop if named else None, blocks)


def check_blocks(rates: tuple[float, ...], family: Family, optimizer: OptimizerChoice, mistakes: Mistakes) -> None:
    """--block_lr has a rate for each block."""
    if rates and family.blocks and len(rates) != family.blocks:
        mistakes.add(
            f"--block_lr has {len(rates)} learning rates; the {family.backbone_title} of {family.title} has "
            f"{family.blocks} blocks",
            f"give {family.blocks}, separated by commas; 0 leaves a block as it is",
        )
    if rates and optimizer.relative_step:
        mistakes.add(f"--block_lr with {optimizer.name}, which finds its own rate", "take one of the two out")


def check_text_rates(given: tuple[float, ...], family: Family, notes: list[str]) -> None:
    """Tell of rates for text encoders that the model has not. Front-ends write two equal ones for every model."""
    spare = given[len(family.text_encoders) :]
    if any(rate != given[0] for rate in spare):
        count = len(family.text_encoders)
        notes.append(
            f"--text_encoder_lr: {family.title} has {count} text encoder{'s' if count > 1 else ''}; no effect of "
            f"{', '.join(f'{rate:g}' for rate in spare)}"
        )


def adapter_rates(options: TrainOptions, family: Family, adapter: AdapterPlan) -> LearningRates:
    """An adapter's parts learn at --unet_lr and --text_encoder_lr, which may be one for all text encoders or one for
    each, else at --learning_rate."""
    usual, chosen = options.optimizer.learning_rate, options.adapter
    rates = {family.backbone: usual if chosen.unet_lr is None else chosen.unet_lr}
    given = chosen.text_encoder_lr or (usual,)
    for place, name in enumerate(family.text_encoders):
        rates[name] = given[min(place, len(given) - 1)]
    return LearningRates({name: rate for name, rate in rates.items() if name in adapter.reaches})
