"""Learning rates per module and block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from library.families.family import Family, PartSizes
from library.messages import counted
from library.options.groups.optimizer import OptimizerOptions
from library.options.mistakes import Mistakes
from library.options.train_options import FLAGS, TrainOptions
from library.training.adapter.plan import AdapterPlan
from library.training.optim.optimizers import OptimizerChoice
from library.training.optim.schedules import ScheduleChoice
from library.training.update.plan import UpdatePlan


@dataclass(frozen=True)
class LearningRates:
    """Learning rates of the trained modules by name: the backbone, then the text encoders in the family's order.

    `text_encoder_stop`: the last optimizer step of the text encoders (None: the end of the run). `blocks`: rate of each
    block of the backbone, used instead of its rate in `modules`; 0: the block is not trained.
    """

    modules: Mapping[str, float]
    text_encoder_stop: int | None = None
    blocks: tuple[float, ...] = ()

    def trained_values(self, sizes: PartSizes, family: Family) -> int:
        """How many values of a whole model are trained: those of blocks with a rate of 0 are not."""
        total, block_of = sizes.total(self.modules), family.block_of
        if 0 not in self.blocks or block_of is None or len(self.blocks) != family.blocks:  # a mistake, told elsewhere
            return total
        shapes = sizes.shapes[family.backbone].items()
        return total - sum(math.prod(shape) for name, shape in shapes if self.blocks[block_of(name)] == 0)


@dataclass(frozen=True)
class Optimization:
    """Learning rates, optimizer and schedule of a run, how the weights are updated, and after how many steps at most
    losses are read."""

    learning_rates: LearningRates
    optimizer: OptimizerChoice
    schedule: ScheduleChoice
    update: UpdatePlan
    read_interval: int


def decide_learning_rates(
    options: TrainOptions,
    family: Family,
    adapter: AdapterPlan | None,
    optimizer: OptimizerChoice,
    mistakes: Mistakes,
    notes: list[str],
) -> LearningRates:
    """The learning rates of a whole model or of an adapter. All 0 is a mistake, unless the optimizer sets its own."""
    if adapter is None:
        rates = model_rates(options.optimizer, family)
        check_block_rates(options.optimizer.block_lr, family, optimizer, mistakes)
    else:
        rates = adapter_rates(options, family, adapter)
        check_text_encoder_rates(options.adapter.text_encoder_lr, family, notes)
        if not (optimizer.relative_step or optimizer.row.learning_rate_free):
            note_whole_model_rate(rates.modules, family, notes)
    reaches_nothing = adapter is not None and adapter.layers == ()  # told already, and not for its learning rate
    if not any((*rates.modules.values(), *rates.blocks)) and not optimizer.relative_step and not reaches_nothing:
        mistakes.add("--learning_rate 0: nothing would be trained", "use a learning rate above 0")
    return rates


def model_rates(options: OptimizerOptions, family: Family) -> LearningRates:
    """Learning rates of a whole model.

    Text encoders use --learning_rate_te1 and _te2, else --learning_rate_te, else --learning_rate. They are not trained
    with a rate of 0, or a --stop_text_encoder_training of 0 or -1.
    """
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


def check_block_rates(rates: tuple[float, ...], family: Family, optimizer: OptimizerChoice, mistakes: Mistakes) -> None:
    """Check that --block_lr has a learning rate for each block."""
    if rates and family.blocks and len(rates) != family.blocks:
        mistakes.add(
            f"--block_lr has {len(rates)} learning rates; the {family.backbone_title} of {family.title} has "
            f"{family.blocks} blocks",
            f"give {family.blocks} values, separated by commas; 0 leaves a block untrained",
        )
    if rates and optimizer.relative_step:
        mistakes.add(
            f"--block_lr cannot be combined with {optimizer.name}, which sets its own learning rate",
            "remove --block_lr, or use --optimizer_args relative_step=False",
        )


def check_text_encoder_rates(rates: tuple[float, ...], family: Family, notes: list[str]) -> None:
    """Note learning rates of text encoders that the model does not have. Front-ends write two equal ones for every
    model, which are not reported."""
    count = len(family.text_encoders)
    unused = rates[count:]
    if any(rate != rates[0] for rate in unused):
        notes.append(
            f"--text_encoder_lr: {family.title} has {counted(count, 'text encoder')}, so "
            f"{', '.join(f'{rate:g}' for rate in unused)} has no effect"
        )


def note_whole_model_rate(rates: Mapping[str, float], family: Family, notes: list[str]) -> None:
    """Note where an adapter is trained with the default rate, which is one for all weights of a model."""
    default = FLAGS["learning_rate"].default
    slow = [family.module_titles[name] for name, rate in rates.items() if rate == default]
    if slow:
        notes.append(
            f"learning rate {default:g} of the adapter ({', '.join(slow)}) is the default for whole models; adapters "
            "usually need about 1e-4: --learning_rate 1e-4"
        )


def adapter_rates(options: TrainOptions, family: Family, adapter: AdapterPlan) -> LearningRates:
    """Learning rates of the parts of an adapter: --unet_lr and --text_encoder_lr, which may have one value for all text
    encoders or one for each, else --learning_rate."""
    default, unet_lr = options.optimizer.learning_rate, options.adapter.unet_lr
    rates = {family.backbone: default if unet_lr is None else unet_lr}
    text_encoder_lr = options.adapter.text_encoder_lr or (default,)
    for place, name in enumerate(family.text_encoders):
        rates[name] = text_encoder_lr[min(place, len(text_encoder_lr) - 1)]
    return LearningRates({name: rate for name, rate in rates.items() if name in adapter.trained_modules})
