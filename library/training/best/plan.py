"""Plan which checkpoint is kept as the best, and when a run stops early. No torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.messages import counted
from library.training.best.metrics import METRICS, Metric

if TYPE_CHECKING:
    from library.options.groups.validation import ValidationOptions
    from library.options.mistakes import Mistakes
    from library.training.evaluation.plan import EvaluationPlan
    from library.training.plan.duration import Duration
    from library.training.saving.state import SavedState, Standing
    from library.training.validation.plan import SetName, ValidationPlan

_MEASURED: Mapping[SetName, Sequence[str]] = {
    "held_out": ("validation_loss", "validation_divergence"),
    "training": ("training_loss",),
    "class": ("class_loss",),
}


@dataclass(frozen=True)
class BestPlan:
    """`keep`: the metric of the checkpoint that is kept. `stop`: the metric that stops the run once it has not become
    better in `patience` measurements. None: not asked for."""

    keep: Metric | None = None
    stop: Metric | None = None
    patience: int = 0

    @property
    def metrics(self) -> list[Metric]:
        """All metrics that are followed, each once."""
        return list(dict.fromkeys(metric for metric in (self.keep, self.stop) if metric is not None))

    def describe(self) -> Iterator[str]:
        """The line of the plan about stopping."""
        if self.stop is not None:
            yield f"ends early once {self.stop.name} has not become better in {counted(self.patience, 'measurement')}"


def read_best(options: ValidationOptions, origins: Mapping[str, str], mistakes: Mistakes) -> BestPlan:
    """The plan, from the flags alone. Adds a mistake for a flag that cannot be read or names no metric."""
    keep = stop = None
    patience = 0
    if options.keep_best:
        keep = _metric(options.keep_best, _asked("keep_best", options.keep_best, origins), mistakes)
    if options.early_stop:
        asked = _asked("early_stop", options.early_stop, origins)
        form = re.fullmatch(r"\s*(\w+)\s*[:=]\s*([1-9]\d*)\s*", options.early_stop)
        if form is None:
            remedy = "write METRIC:PATIENCE, for example validation_loss:3 (measurements without a better value)"
            mistakes.add(f"{asked} cannot be read", remedy)
        else:
            stop, patience = _metric(form[1], asked, mistakes), int(form[2])
    return BestPlan(keep, stop, patience)


def check_best(
    plan: BestPlan,
    origins: Mapping[str, str],
    measurements: Mapping[str, int],
    resume: SavedState | None,
    mistakes: Mistakes,
    notes: list[str],
) -> None:
    """Check that the run measures what the plan follows, and is not over yet. `measurements`: how often the run
    measures each metric that it measures."""
    if plan.keep is not None:
        _check_measured(plan.keep, _asked("keep_best", plan.keep.name, origins), measurements, mistakes)
    stop = plan.stop
    if stop is None:
        return
    given = f"{stop.name}:{plan.patience}"
    _check_measured(stop, _asked("early_stop", given, origins), measurements, mistakes)
    if plan.patience >= measurements.get(stop.name, plan.patience + 1):
        times = counted(measurements[stop.name], "time")
        notes.append(f"--early_stop {given} never stops the run, which measures {stop.name} {times}")
    if resume is not None and is_over(plan, resume.progress.standings):
        standing = resume.progress.standings[stop.name]
        mistakes.add(
            f"--resume {resume.folder}: the run stopped early after step {resume.progress.step}: {stop.name} had not "
            f"become better since step {standing['step']} ({counted(standing['waited'], 'measurement')})",
            "raise the patience of --early_stop to go on, or leave it out",
        )


def _asked(flag: str, value: str, origins: Mapping[str, str]) -> str:
    return f"--{flag} {value} ({origins[flag]})"


def _metric(name: str, asked: str, mistakes: Mistakes) -> Metric | None:
    metric = METRICS.get(name.strip().lower())
    if metric is None:
        near = difflib.get_close_matches(name, METRICS, 1, 0.6)
        own = [each for each in METRICS if not each.endswith("_ema")]
        mistakes.add(
            f"{asked}: there is no such metric", f"did you mean {near[0]}?" if near else f"use one of {', '.join(own)}"
        )
    return metric


def _check_measured(metric: Metric, asked: str, measurements: Mapping[str, int], mistakes: Mistakes) -> None:
    if measurements.get(metric.name):
        return
    others = [each for each in measurements if measurements[each]]
    instead = f"; this run measures {', '.join(others)}" if others else ""
    mistakes.add(f"{asked}: this run never measures it", f"{metric.remedy}{instead}")


def is_over(plan: BestPlan, standings: Mapping[str, Standing]) -> bool:
    """Whether the metric that stops the run has not become better for as many measurements as the patience."""
    if plan.stop is None or plan.stop.name not in standings:
        return False
    return standings[plan.stop.name]["waited"] >= plan.patience


def count_measurements(
    validation: ValidationPlan | None, evaluation: EvaluationPlan | None, duration: Duration, suffixes: Sequence[str]
) -> dict[str, int]:
    """How often a run from its first step on measures each metric of validation and evaluation. `suffixes`: of the
    versions of the weights that are measured."""
    counts: dict[str, int] = {}
    if validation is not None:
        names = [name for each in validation.sets for name in _MEASURED[each.name]]
        counts |= dict.fromkeys(names, _count(validation, duration))
    if evaluation is not None:
        counts |= dict.fromkeys(evaluation.measures, _count(evaluation, duration))
    return {name + suffix: count for suffix in suffixes for name, count in counts.items()}


def _count(plan: ValidationPlan | EvaluationPlan, duration: Duration) -> int:
    at: set[int] = set()
    if plan.every_n_steps:
        at |= set(range(plan.every_n_steps, duration.steps + 1, plan.every_n_steps))
    if plan.every_n_epochs:
        ends = range(plan.every_n_epochs, duration.epochs + 1, plan.every_n_epochs)
        at |= {min(epoch * duration.steps_per_epoch, duration.steps) for epoch in ends}
    return len(at)
