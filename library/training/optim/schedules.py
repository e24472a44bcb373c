"""The course of the learning rate: decided from the options without importing torch, then built over the optimiser.

A schedule counts optimiser steps, on any number of processes: the loop steps it once after each. Fractions of the
options are fractions of all optimiser steps of the run. The formulas are those of transformers and diffusers, as users
know them from there.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from library.options.mistakes import Mistake, UserError
from library.options.train_options import FLAGS
from library.training.optim.constructors import load, look_up, read_arguments, refuse_unknown

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from library.options.groups.optimizer import OptimizerOptions
    from library.training.optim.optimizers import OptimizerChoice


@dataclass(frozen=True)
class ScheduleRow:
    """One schedule: the function that makes it, and which of its arguments comes from which option."""

    name: str
    path: str
    takes: Mapping[str, str] = field(default_factory=dict)

    @property
    def warms_up(self) -> bool:
        """Whether the schedule has a warm-up of its own."""
        return "lr_warmup_steps" in self.takes


_T = "transformers.optimization."
_WARMUP = {"lr_warmup_steps": "num_warmup_steps"}
_WARMUP_TOTAL = {**_WARMUP, "total": "num_training_steps"}
_CYCLES, _HALF_CYCLES = {"lr_scheduler_num_cycles": "num_cycles"}, {"half_cycles": "num_cycles"}

SCHEDULES: tuple[ScheduleRow, ...] = (
    ScheduleRow("linear", _T + "get_linear_schedule_with_warmup", _WARMUP_TOTAL),
    ScheduleRow("cosine", _T + "get_cosine_schedule_with_warmup", _WARMUP_TOTAL),
    ScheduleRow(
        "cosine_with_restarts", _T + "get_cosine_with_hard_restarts_schedule_with_warmup", {**_WARMUP_TOTAL, **_CYCLES}
    ),
    ScheduleRow(
        "polynomial",
        _T + "get_polynomial_decay_schedule_with_warmup",
        {**_WARMUP_TOTAL, "lr_scheduler_power": "power"},
    ),
    ScheduleRow("constant", _T + "get_constant_schedule"),
    ScheduleRow("constant_with_warmup", _T + "get_constant_schedule_with_warmup", _WARMUP),
    ScheduleRow("inverse_sqrt", _T + "get_inverse_sqrt_schedule", {**_WARMUP, "lr_scheduler_timescale": "timescale"}),
    ScheduleRow(
        "cosine_with_min_lr",
        _T + "get_cosine_with_min_lr_schedule_with_warmup",
        {**_WARMUP_TOTAL, **_HALF_CYCLES, "lr_scheduler_min_lr_ratio": "min_lr_rate"},
    ),
    ScheduleRow(
        "warmup_stable_decay",
        _T + "get_wsd_schedule",
        {
            **_WARMUP_TOTAL,
            **_HALF_CYCLES,
            "lr_decay_steps": "num_decay_steps",
            "lr_scheduler_min_lr_ratio": "min_lr_ratio",
        },
    ),
    ScheduleRow("adafactor", _T + "AdafactorSchedule", {"learning_rate": "initial_lr"}),
    ScheduleRow("piecewise_constant", "diffusers.optimization.get_piecewise_constant_schedule"),
)


@dataclass(frozen=True)
class ScheduleChoice:
    """The decision: a row, all arguments of its function, warm-up in optimiser steps, and what is to be said. Not to be
    built while there are `mistakes`."""

    row: ScheduleRow
    arguments: Mapping[str, Any]
    warmup_steps: int = 0
    notes: tuple[str, ...] = ()
    mistakes: tuple[Mistake, ...] = ()

    @property
    def name(self) -> str:
        """The name for plan and messages: what is really used, not always what was asked."""
        return self.row.name


def count_steps(value: int | float, total_steps: int) -> int:
    """Optimiser steps of an option: an int, or a float above 1, is their number, a float up to 1 a share of all."""
    if isinstance(value, float) and value <= 1:
        # the small term keeps 0.29 * 100 = 28.999999999999996 from losing a step
        return int(value * total_steps + 1e-6)
    return int(value)


def choose_schedule(options: OptimizerOptions, total_steps: int, optimizer: OptimizerChoice) -> ScheduleChoice:
    """Decide by options, length of the run and optimiser. Never raises for what the user wrote: see `mistakes`.

    Flags that a schedule needs beside its name (rules of the options) are taken to be there.
    """
    given, mistakes = read_arguments("lr_scheduler_args", options.lr_scheduler_args)
    warmup, decay = count_steps(options.lr_warmup_steps, total_steps), count_steps(options.lr_decay_steps, total_steps)
    if options.lr_scheduler_type and not optimizer.relative_step and not optimizer.row.schedule_free:
        return _choose_class(options, given, warmup, mistakes)
    row, notes = _find_row(options, warmup, optimizer, mistakes)
    if row.name != options.lr_scheduler.lower():
        given = {}  # they were meant for a schedule that has no effect, which a note says
    values = {
        "lr_warmup_steps": warmup,
        "lr_decay_steps": decay,
        "total": total_steps,
        "half_cycles": options.lr_scheduler_num_cycles / 2,
        "lr_scheduler_num_cycles": options.lr_scheduler_num_cycles,
        "lr_scheduler_power": options.lr_scheduler_power,
        "lr_scheduler_timescale": options.lr_scheduler_timescale,
        "lr_scheduler_min_lr_ratio": options.lr_scheduler_min_lr_ratio or 0.0,
        "learning_rate": options.learning_rate,
    }
    ours = {argument: values[option] for option, argument in row.takes.items()}
    if row.name == "cosine_with_min_lr" and options.lr_scheduler_min_lr_ratio is None and given:
        ours.pop("min_lr_rate")  # the lowest rate may stand in lr_scheduler_args: min_lr, min_lr_rate
    accepted = look_up(row.path).arguments
    open_ones = None if accepted is None else accepted - set(ours) - {"last_epoch"}
    mistakes += refuse_unknown("lr_scheduler_args", row.name, given, open_ones)
    mistakes += _judge_lengths(row, options, warmup, decay, total_steps)
    mistakes += _judge_arguments(row, options, given)
    notes += _unused(row, options, warmup, decay)
    arguments = {**given, **ours}
    return ScheduleChoice(row, arguments, warmup if row.warms_up else 0, tuple(notes), tuple(mistakes))


def _find_row(
    options: OptimizerOptions, warmup: int, optimizer: OptimizerChoice, mistakes: list[Mistake]
) -> tuple[ScheduleRow, list[str]]:
    """The row that fits what was asked and what the optimiser allows, with a note where these differ."""
    rows = {row.name: row for row in SCHEDULES}
    asked = options.lr_scheduler_type or options.lr_scheduler.lower()
    if optimizer.relative_step:
        return rows["adafactor"], []  # the optimiser's own note says that other schedules have no effect
    if optimizer.row.schedule_free:
        name = "constant_with_warmup" if warmup else "constant"
        said = [f"{optimizer.name} needs no schedule: lr_scheduler {asked} has no effect, the rate is {name}"]
        return rows[name], said if asked not in {"constant", name} else []
    if asked == "constant" and warmup:
        said = [f"lr_scheduler constant with a warm-up of {warmup} steps: constant_with_warmup is used"]
        return rows["constant_with_warmup"], said
    if asked not in rows:
        near = difflib.get_close_matches(asked, rows, 1, 0.6)
        listed = f"one of {', '.join(rows)}, or --lr_scheduler_type package.module.Class"
        remedy = f"did you mean {near[0]}?" if near else listed
        mistakes.append(Mistake(f"--lr_scheduler {asked}: there is no schedule of this name", remedy))
        return rows["constant_with_warmup"], []
    if asked == "adafactor":
        # without relative_step it would feed each scaled rate back as the next one's base
        what = f"--lr_scheduler adafactor shows the rate that Adafactor finds itself; {optimizer.name} has none here"
        mistakes.append(Mistake(what, "use Adafactor with relative_step=True, or another schedule such as cosine"))
    return rows[asked], []


def _judge_lengths(
    row: ScheduleRow, options: OptimizerOptions, warmup: int, decay: int, total_steps: int
) -> list[Mistake]:
    """Warm-up and decay that a schedule does not have, or that a run has no room for."""
    mistakes = []
    for flag in ("lr_warmup_steps", "lr_decay_steps"):
        value = getattr(options, flag)
        if isinstance(value, float) and value > 1 and not value.is_integer():
            what = f"--{flag} {value:g} is neither a number of steps nor a share of the run"
            mistakes.append(Mistake(what, "give a whole number, or a share below 1 such as 0.1"))
    if warmup and row.name == "piecewise_constant":
        what = f"--lr_warmup_steps {options.lr_warmup_steps}: the schedule {row.name} has no warm-up"
        mistakes.append(Mistake(what, "write it into the rules, or --lr_warmup_steps 0"))
    if not row.warms_up:
        return mistakes
    decay = decay if "lr_decay_steps" in row.takes else 0
    if warmup + decay > total_steps or (row.name == "polynomial" and warmup == total_steps):
        taken = f"warm-up and decay take {warmup} + {decay}" if decay else f"the warm-up takes {warmup}"
        what = f"{taken} optimiser steps, the run has {total_steps}"
        mistakes.append(Mistake(what, "lower --lr_warmup_steps or --lr_decay_steps; below 1 they are shares"))
    return mistakes


def _judge_arguments(row: ScheduleRow, options: OptimizerOptions, given: Mapping[str, Any]) -> list[Mistake]:
    """Values that a schedule cannot be built with."""
    mistakes = []
    if row.name == "piecewise_constant" and "step_rules" in given:
        mistakes += _judge_rules(given["step_rules"])
    if row.name == "polynomial":
        end = given.get("lr_end", 1e-7)
        if isinstance(end, int | float) and not options.learning_rate > end:
            what = f"--lr_scheduler polynomial falls to {end:g}, learning_rate is {options.learning_rate:g}"
            mistakes.append(Mistake(what, "give a lower end: --lr_scheduler_args lr_end=0"))
    return mistakes


def _judge_rules(rules: Any) -> list[Mistake]:
    """`1:10,0.1:20,0.01`: factor 1 before step 10, 0.1 before step 20, then 0.01."""
    remedy = "--lr_scheduler_args step_rules=1:10,0.1:20,0.01 (factor:up to this step, the last factor alone)"
    *pieces, last = str(rules).split(",")
    try:
        float(last)
        steps = [(float(factor), int(step))[1] for factor, step in (piece.split(":") for piece in pieces)]
    except ValueError:
        return [Mistake(f"--lr_scheduler_args step_rules={rules} cannot be read", remedy)]
    if steps != sorted(set(steps)):
        return [Mistake(f"--lr_scheduler_args step_rules={rules}: the steps do not grow", remedy)]
    return []


_ONLY_SOME_USE = (
    "lr_scheduler_num_cycles", "lr_scheduler_power", "lr_scheduler_timescale", "lr_scheduler_min_lr_ratio",
)  # fmt: skip


def _unused(row: ScheduleRow, options: OptimizerOptions, warmup: int, decay: int) -> list[str]:
    """A note for each option of schedules that this one has no use for."""
    taken = {"lr_scheduler_num_cycles"} if "half_cycles" in row.takes else set()
    taken |= set(row.takes)
    unused = [
        f"{name} {getattr(options, name)}"
        for name in _ONLY_SOME_USE
        if name not in taken and getattr(options, name) != FLAGS[name].default
    ]
    if warmup and row.name == "adafactor":
        unused.append(f"lr_warmup_steps {options.lr_warmup_steps} (Adafactor's own warm-up is warmup_init=True)")
    if decay and "lr_decay_steps" not in taken:
        unused.append(f"lr_decay_steps {options.lr_decay_steps}")
    notes = [f"the schedule {row.name} has no use for {', '.join(unused)}"] if unused else []
    if "lr_decay_steps" in taken and not decay:
        notes.append(f"the schedule {row.name} without lr_decay_steps keeps the rate to the end")
    return notes


def _choose_class(
    options: OptimizerOptions, given: Mapping[str, Any], warmup: int, mistakes: list[Mistake]
) -> ScheduleChoice:
    """A class named by lr_scheduler_type: its arguments are lr_scheduler_args and nothing else."""
    name = options.lr_scheduler_type
    path = name if "." in name else f"torch.optim.lr_scheduler.{name}"
    found = look_up(path)
    if found.problem:
        missing = f"install the package that brings {found.missing_package}"
        remedy = missing if found.missing_package else "check the path of the class"
        mistakes = [*mistakes, Mistake(f"--lr_scheduler_type {name}: {found.problem}", remedy)]
    elif path.endswith(".ReduceLROnPlateau"):
        what = f"--lr_scheduler_type {name} follows a validation loss, which this trainer does not feed it"
        mistakes = [*mistakes, Mistake(what, "choose a schedule that counts steps")]
    if warmup:
        what = f"--lr_warmup_steps {options.lr_warmup_steps} does not reach a class given by --lr_scheduler_type"
        mistakes = [*mistakes, Mistake(what, "--lr_warmup_steps 0")]
    mistakes = [*mistakes, *refuse_unknown("lr_scheduler_args", name, given, found.arguments)]
    return ScheduleChoice(ScheduleRow(name, path), dict(given), mistakes=tuple(mistakes))


def make_schedule(choice: ScheduleChoice, optimizer: Optimizer) -> LRScheduler:
    """The schedule over an optimiser; step it once after each optimiser step.

    Raises UserError when its function refuses the arguments.
    """
    try:
        schedule: LRScheduler = load(choice.row.path)(optimizer, **choice.arguments)
    except (ImportError, AttributeError, TypeError, ValueError, AssertionError, RuntimeError) as error:
        what = f"the learning-rate schedule {choice.name} with {dict(choice.arguments)}: {error}"
        raise UserError((Mistake(what, "check --lr_scheduler_args"),)) from error
    return schedule
