"""The learning rate schedule of a run: chosen from the options without importing torch, then built over the optimizer.

A schedule counts optimizer steps, on any number of processes: the loop steps it once after each. Shares in the options
are shares of all optimizer steps of the run. The formulas are those of transformers and diffusers.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import TYPE_CHECKING, Any

from library.messages import counted
from library.options.mistakes import Mistake, UserError
from library.options.train_options import FLAGS
from library.training.optim.constructors import check_arguments, check_required, load, look_up, read_arguments
from library.training.optim.optimizers import make_optimizer

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from library.options.groups.optimizer import OptimizerOptions
    from library.training.optim.optimizers import OptimizerChoice


@dataclass(frozen=True)
class ScheduleRow:
    """One schedule: the path of the function that builds it; `takes`: option -> argument that it sets."""

    name: str
    path: str
    takes: Mapping[str, str] = field(default_factory=dict)

    @property
    def warms_up(self) -> bool:
        """Whether the schedule has a warm-up."""
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
    """A row, all arguments of its function, the warm-up in optimizer steps, and the notes and mistakes about them. Must
    not be built if there are `mistakes`."""

    row: ScheduleRow
    arguments: Mapping[str, Any]
    warmup_steps: int = 0
    notes: tuple[str, ...] = ()
    mistakes: tuple[Mistake, ...] = ()

    @property
    def name(self) -> str:
        """The name of the schedule that is used, which may differ from --lr_scheduler."""
        return self.row.name


def count_steps(value: int | float, total_steps: int) -> int:
    """Optimizer steps of an option: an int or a float above 1 is a number of steps, a float up to 1 a share of all."""
    if isinstance(value, float) and value <= 1:
        # the small term keeps 0.29 * 100 = 28.999999999999996 from losing a step
        return int(value * total_steps + 1e-6)
    return int(value)


def choose_schedule(options: OptimizerOptions, total_steps: int, optimizer: OptimizerChoice) -> ScheduleChoice:
    """Choose the schedule. User errors are returned as `mistakes`, not raised.

    Flags that a schedule requires are checked by the rules of the options, not here.
    """
    given, mistakes = read_arguments(options.lr_scheduler_args), list[Mistake]()
    warmup, decay = count_steps(options.lr_warmup_steps, total_steps), count_steps(options.lr_decay_steps, total_steps)
    if options.lr_scheduler_type and not optimizer.relative_step and not optimizer.row.schedule_free:
        return _choose_class(options, given, warmup, mistakes)
    row, notes = _find_row(options, warmup, optimizer, mistakes)
    if row.name != options.lr_scheduler.lower():
        given = {}  # arguments of a schedule that is not used, as a note says
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
    from_options = {argument: values[option] for option, argument in row.takes.items()}
    if row.name == "cosine_with_min_lr" and options.lr_scheduler_min_lr_ratio is None and given:
        from_options.pop("min_lr_rate")  # lr_scheduler_args may set it: min_lr, min_lr_rate
    accepted = look_up(row.path).arguments
    mistakes += check_arguments("lr_scheduler_args", row.name, given, accepted, ours=(*from_options, "last_epoch"))
    mistakes += _check_lengths(row, options, warmup, decay, total_steps)
    mistakes += _check_arguments(row, options, given)
    notes += _unused_options(row, options, warmup, decay)
    arguments = {**given, **from_options}
    return ScheduleChoice(row, arguments, warmup if row.warms_up else 0, tuple(notes), tuple(mistakes))


def _find_row(
    options: OptimizerOptions, warmup: int, optimizer: OptimizerChoice, mistakes: list[Mistake]
) -> tuple[ScheduleRow, list[str]]:
    """The row for the requested schedule, or the one that this optimizer needs instead, with a note."""
    rows = {row.name: row for row in SCHEDULES}
    name = options.lr_scheduler_type or options.lr_scheduler.lower()
    if optimizer.relative_step:
        return rows["adafactor"], []  # the note about Adafactor says that schedules have no effect
    if optimizer.row.schedule_free:
        used = "constant_with_warmup" if warmup else "constant"
        note = f"{optimizer.name} needs no schedule: --lr_scheduler {name} has no effect, {used} is used"
        return rows[used], [note] if name not in {"constant", used} else []
    if name == "constant" and warmup:
        note = f"--lr_scheduler constant with a warm-up of {counted(warmup, 'step')}: constant_with_warmup is used"
        return rows["constant_with_warmup"], [note]
    if name not in rows:
        near = difflib.get_close_matches(name, rows, 1, 0.6)
        names = f"use one of {', '.join(rows)}, or --lr_scheduler_type package.module.Class"
        remedy = f"did you mean {near[0]}?" if near else names
        mistakes.append(Mistake(f"--lr_scheduler {name}: there is no schedule with this name", remedy))
        return rows["constant_with_warmup"], []
    if name == "adafactor":
        # without relative_step each scaled rate would become the base of the next one
        what = "--lr_scheduler adafactor needs --optimizer_type Adafactor with relative_step=True"
        mistakes.append(Mistake(what, "use both, or another schedule such as cosine"))
    return rows[name], []


def _check_lengths(
    row: ScheduleRow, options: OptimizerOptions, warmup: int, decay: int, total_steps: int
) -> list[Mistake]:
    """Mistakes in the lengths of warm-up and decay: no number, unused by the schedule, or longer than the run."""
    mistakes = []
    for flag in ("lr_warmup_steps", "lr_decay_steps"):
        value = getattr(options, flag)
        if isinstance(value, float) and value > 1 and not value.is_integer():
            what = f"--{flag} {value:g} is neither a number of steps nor a share of the run"
            mistakes.append(Mistake(what, "use a whole number, or a share below 1 such as 0.1"))
    if warmup and row.name == "piecewise_constant":
        what = f"--lr_warmup_steps {options.lr_warmup_steps}: the schedule {row.name} has no warm-up"
        mistakes.append(Mistake(what, "add the warm-up to step_rules, and use --lr_warmup_steps 0"))
    if not row.warms_up:
        return mistakes
    decay = decay if "lr_decay_steps" in row.takes else 0
    if warmup + decay > total_steps or (row.name == "polynomial" and warmup == total_steps):
        lengths = f"warm-up and decay take {warmup} + {decay}" if decay else f"the warm-up takes {warmup}"
        what = f"{lengths} optimizer steps, but the run has {total_steps}"
        mistakes.append(
            Mistake(what, "lower --lr_warmup_steps or --lr_decay_steps; values below 1 are shares of the run")
        )
    return mistakes


def _check_arguments(row: ScheduleRow, options: OptimizerOptions, given: Mapping[str, Any]) -> list[Mistake]:
    """Mistakes in the values of --lr_scheduler_args."""
    mistakes = []
    if row.name == "piecewise_constant" and "step_rules" in given:
        mistakes += _check_step_rules(str(given["step_rules"]))
    if row.name == "polynomial":
        end = given.get("lr_end", 1e-7)
        if isinstance(end, int | float) and not options.learning_rate > end:
            what = f"--lr_scheduler polynomial falls to {end:g}, but --learning_rate is {options.learning_rate:g}"
            mistakes.append(Mistake(what, "use a lower end: --lr_scheduler_args lr_end=0"))
    return mistakes


def rule_steps(rules: str) -> list[int]:
    """The steps of `1:10,0.1:20,0.01`: factor 1 before step 10, 0.1 before step 20, then 0.01. Raises ValueError."""
    *pieces, last = rules.split(",")
    float(last)
    return [(float(factor), int(step))[1] for factor, step in (piece.split(":") for piece in pieces)]


def _check_step_rules(rules: str) -> list[Mistake]:
    remedy = "use for example step_rules=1:10,0.1:20,0.01 (factor:end step, ..., final factor)"
    try:
        steps = rule_steps(rules)
    except ValueError:
        return [Mistake(f"--lr_scheduler_args step_rules={rules} cannot be read", remedy)]
    if steps != sorted(set(steps)):
        return [Mistake(f"--lr_scheduler_args step_rules={rules}: the steps do not increase", remedy)]
    return []


_ONLY_SOME_USE = (
    "lr_scheduler_num_cycles", "lr_scheduler_power", "lr_scheduler_timescale", "lr_scheduler_min_lr_ratio",
)  # fmt: skip


def _unused_options(row: ScheduleRow, options: OptimizerOptions, warmup: int, decay: int) -> list[str]:
    """Notes about options that this schedule does not use."""
    used = set(row.takes) | ({"lr_scheduler_num_cycles"} if "half_cycles" in row.takes else set())
    unused = [
        f"--{name} {getattr(options, name)}"
        for name in _ONLY_SOME_USE
        if name not in used and getattr(options, name) != FLAGS[name].default
    ]
    if warmup and row.name == "adafactor":
        unused.append(f"--lr_warmup_steps {options.lr_warmup_steps} (for Adafactor use warmup_init=True)")
    if decay and "lr_decay_steps" not in used:
        unused.append(f"--lr_decay_steps {options.lr_decay_steps}")
    notes = [f"the schedule {row.name} does not use {', '.join(unused)}"] if unused else []
    if "lr_decay_steps" in used and not decay:
        notes.append(f"the schedule {row.name} does not lower the learning rate at the end without --lr_decay_steps")
    return notes


def _choose_class(
    options: OptimizerOptions, given: Mapping[str, Any], warmup: int, mistakes: list[Mistake]
) -> ScheduleChoice:
    """A class given by --lr_scheduler_type, with --lr_scheduler_args as its only arguments."""
    name = options.lr_scheduler_type
    path = name if "." in name else f"torch.optim.lr_scheduler.{name}"
    found = look_up(path)
    if found.problem:
        install = f"install the package that provides {found.missing_package}"
        remedy = install if found.missing_package else "check the path of the class"
        mistakes = [*mistakes, Mistake(f"--lr_scheduler_type {name}: {found.problem}", remedy)]
    elif path.endswith(".ReduceLROnPlateau"):
        what = f"--lr_scheduler_type {name} needs a validation loss, which schedules do not receive here"
        mistakes = [*mistakes, Mistake(what, "use a schedule that depends only on steps")]
    if warmup:
        what = f"--lr_warmup_steps {options.lr_warmup_steps} has no effect with --lr_scheduler_type"
        mistakes = [*mistakes, Mistake(what, "use --lr_warmup_steps 0")]
    mistakes = [*mistakes, *check_arguments("lr_scheduler_args", name, given, found.arguments)]
    mistakes += check_required("lr_scheduler_args", name, given, found.arguments)
    return ScheduleChoice(ScheduleRow(name, path), dict(given), mistakes=tuple(mistakes))


def make_schedule(choice: ScheduleChoice, optimizer: Optimizer) -> LRScheduler:
    """Build the schedule over an optimizer; it must be stepped once after each optimizer step.

    Raises UserError if its function refuses the arguments.
    """
    from torch.optim.lr_scheduler import LRScheduler

    try:
        schedule: LRScheduler = load(choice.row.path)(optimizer, **choice.arguments)
        if isinstance(schedule, LRScheduler) and not hasattr(schedule, "_step_count"):
            schedule._step_count = 1  # a class that never calls LRScheduler.__init__, which counts the first step
    except (ImportError, AttributeError, TypeError, ValueError, AssertionError, RuntimeError) as error:
        what = f"cannot build the learning rate schedule {choice.name} with {dict(choice.arguments)}: {error}"
        raise UserError((Mistake(what, "check --lr_scheduler_args"),)) from error
    return schedule


def try_out(optimizer: OptimizerChoice, schedule: ScheduleChoice, learning_rate: float) -> None:
    """Build both over one parameter and step the schedule, so that what only their code can refuse is refused before
    weights are loaded. Raises UserError."""
    import torch

    with redirect_stdout(StringIO()), warnings.catch_warnings(action="ignore"):  # some optimizers greet
        parameter = torch.nn.Parameter(torch.zeros(1))
        made = make_schedule(schedule, make_optimizer(optimizer, [{"params": [parameter], "lr": learning_rate}]))
        try:
            made.step()
            made.load_state_dict(made.state_dict())
            list(made.get_last_lr())
        except Exception as error:  # whatever the code of a class named by the user raises
            what = f"the learning rate schedule {schedule.name} cannot be used: {type(error).__name__}: {error}"
            remedy = "choose another --lr_scheduler or --lr_scheduler_type, which is a class like those of torch.optim"
            raise UserError((Mistake(what, remedy),)) from error
