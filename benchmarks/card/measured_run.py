"""Run a real training command in this process and measure it from inside, without touching what it does.

A recipe is wrapped: its choice fills the model with random weights first and gets two marks at the end of a step, at
which alone the device is waited for. Nothing is saved.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from benchmarks.card.gauge import Gauge, Peak
from benchmarks.card.hollow import random_weights

if TYPE_CHECKING:
    from pathlib import Path

    from library.families.family import Model
    from library.training.recipe import Recipe
    from library.training.trainable import Trainable


@dataclass
class Measured:
    """One run: exit code, what it printed on the error stream, losses by step, seconds from `began` (of time.time) to
    the end of the first step, seconds of a step, peaks of the whole run and of the measured steps, and a profile."""

    code: int = 0
    error: str = ""
    losses: dict[int, float] = field(default_factory=dict)
    first_step: float | None = None
    seconds: float | None = None
    peak: Peak = field(default_factory=Peak)
    peak_of_steps: Peak = field(default_factory=Peak)
    profile: Any = None
    profiled_seconds: float | None = None

    @property
    def out_of_memory(self) -> bool:
        """Whether the run ended for a lack of memory."""
        return self.code != 0 and "out of memory" in self.error

    @property
    def why_not(self) -> str:
        """The first line of what went wrong."""
        lines = [
            line.strip() for line in self.error.splitlines() if line.strip() and not line.startswith("Dreamfolder")
        ]
        return lines[0][:160] if lines else f"exit code {self.code}"


@dataclass(frozen=True)
class Marks:
    """When to measure, in finished steps: `warm` steps are not counted, then come `steps`, then `profiled` ones under
    torch's profiler, which slows them down."""

    warm: int = 5
    steps: int = 20
    profiled: int = 0

    @property
    def total(self) -> int:
        """Steps of the run."""
        return self.warm + self.steps + self.profiled


class Stopwatch:
    """Takes the measurements of a run from the calls at the ends of its steps."""

    def __init__(self, marks: Marks, began: float, measured: Measured) -> None:
        self.marks, self.began, self.measured = marks, began, measured
        self.finished, self.start = 0, 0.0
        self.gauge: Gauge | None = None

    def step_ended(self, trainable: Trainable) -> None:
        """Called after each optimizer step."""
        if self.gauge is None:
            self.gauge = Gauge(next(trainable.parts[0].module.parameters()).device)
        self.finished += 1
        gauge, marks, measured = self.gauge, self.marks, self.measured
        if self.finished == 1:
            gauge.now()
            measured.first_step = time.time() - self.began
        if self.finished == marks.warm:
            self.start = gauge.now()
            measured.peak = gauge.peak()
            gauge.reset_peak()
        if self.finished == marks.warm + marks.steps:
            measured.seconds = (gauge.now() - self.start) / marks.steps
            measured.peak_of_steps = gauge.peak()
            measured.peak = measured.peak.most(measured.peak_of_steps)
            if marks.profiled:
                measured.profile = _start_profile(gauge)
                self.start = time.perf_counter()
        if marks.profiled and self.finished == marks.total:
            measured.profiled_seconds = gauge.now() - self.start
            measured.profile.stop()


def _start_profile(gauge: Gauge) -> Any:
    """Start torch's profiler for the CPU and the device."""
    from torch.profiler import ProfilerActivity, profile

    kinds = {"cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}
    profiler = profile(activities=[ProfilerActivity.CPU, *filter(None, [kinds.get(gauge.device.type)])])
    profiler.start()
    return profiler


def wrapped(recipe: Recipe, stopwatch: Stopwatch | None, made: list[Trainable], *, random: bool, saves: bool) -> Recipe:
    """A recipe that does the same, tells the stopwatch, draws the weights anew if asked (`random`), and writes no model
    without `saves`. What it trains is added to `made`."""

    def choose(model: Model, *others: Any) -> Trainable:
        if random:
            import torch

            torch.manual_seed(1)
            for module in model.modules().values():
                random_weights(module)
        trainable = recipe.choose(model, *others)
        made.append(trainable)
        if not saves:
            trainable = replace(trainable, write=_write_nothing)
        if stopwatch is None:
            return trainable
        ended = trainable.step_ended

        def step_ended() -> dict[str, float]:
            values = ended()
            stopwatch.step_ended(trainable)
            return values

        return replace(trainable, step_ended=step_ended)

    return replace(recipe, choose=choose)


def _write_nothing(path: Path, *_: Any) -> None:
    """In place of a model of gigabytes: a file of one byte."""
    path.write_bytes(b"0")


def measure(
    recipe: Recipe,
    arguments: Sequence[str],
    marks: Marks | None,
    began: float | None = None,
    *,
    random: bool = True,
    saves: bool = False,
) -> Measured:
    """Run a recipe with these arguments in this process. `marks` None: only its losses are recorded."""
    from accelerate.state import AcceleratorState

    from library.training.command import run_recipe

    measured, made = Measured(), list["Trainable"]()
    stopwatch = None if marks is None else Stopwatch(marks, time.time() if began is None else began, measured)
    output, errors = io.StringIO(), io.StringIO()
    AcceleratorState._reset_state(reset_partial_state=True)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), recorded(measured.losses.__setitem__):
        try:
            measured.code = run_recipe(wrapped(recipe, stopwatch, made, random=random, saves=saves), arguments)
        except Exception as error:  # noqa: BLE001 - what a run cannot do here is a row of the table
            measured.code = 1
            errors.write(f"\n{type(error).__name__}: {error}")
        measured.error = errors.getvalue() if measured.code else ""
    AcceleratorState._reset_state(reset_partial_state=True)
    for trainable in made:
        let_go(trainable)
    if measured.code == 1:  # an error of ours: the last line says which
        measured.error = "\n".join(reversed(measured.error.strip().splitlines()))
    return measured


def let_go(trainable: Trainable) -> None:
    """Clear the hooks of its parameters: a parameter and a hook that knows it are never collected."""
    for part in trainable.parts:
        for parameter in part.module.parameters():
            hooks: Any = getattr(parameter, "_post_accumulate_grad_hooks", None)
            if hooks:
                hooks.clear()


@contextlib.contextmanager
def recorded(record: Callable[[int, float], None]) -> Iterator[None]:
    """Call `record(step, loss)` with what a run logs."""
    from library.training.run import Run

    original = Run.log

    def log(self: Run, values: dict[str, float], step: int) -> None:
        for tag in ("loss", "loss/current"):
            if tag in values:
                record(step, values[tag])
        original(self, values, step)

    Run.log = log  # type: ignore[method-assign]
    try:
        yield
    finally:
        Run.log = original  # type: ignore[method-assign]


def missing_flags(flags: Mapping[str, object]) -> str:
    """Why a run with these flags would not be the one that is meant: this version only knows their names, and would go
    on without. Empty: it would be."""
    from library.options.future_flags import FUTURE_FLAGS

    return ", ".join(f"this version has no --{name}" for name in flags if name in FUTURE_FLAGS)


def command_words(flags: dict[str, object]) -> list[str]:
    """A command line. True adds a flag without a value; None and False leave it out; a list gives several values."""
    line: list[str] = []
    for name, value in flags.items():
        if value is True:
            line.append(f"--{name}")
        elif isinstance(value, list):
            line += [f"--{name}", *map(str, value)]
        elif value is not None and value is not False:
            line.append(f"--{name}={value}")
    return line
