"""Follow what a run measures of its model: keep the best checkpoint, and tell when the run should stop.

Every logged value passes `hear` (see run.py). What is measured after a step is compared with the best so far, which is
part of the progress and so of every training state: a resumed run keeps and stops as one that was never interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.files import read_header
from library.checkpoints.header import CheckpointError
from library.messages import counted
from library.training.best.plan import BestPlan, is_over

if TYPE_CHECKING:
    from library.training.best.metrics import Metric
    from library.training.saving.state import Progress, Standing

STEP = "ss_best_step"


@dataclass
class Best:
    """`save(progress, about)` saves the checkpoint to keep, with metadata about it, at `path`. False: it could not be
    written. Then the next one that is better than that at `path` is saved, though it may not be the best."""

    plan: BestPlan
    save: Callable[[Progress, Mapping[str, str]], bool]
    path: Path
    say: Callable[[str], None]
    _heard: dict[Metric, float] = field(default_factory=dict, init=False)
    _missed: bool = field(default=False, init=False)
    _kept: float | None = field(default=None, init=False)  # the value of the checkpoint that this run has saved

    def hear(self, values: Mapping[str, float]) -> None:
        """Remember the values of the metrics among those that are logged."""
        for metric in self.plan.metrics:
            for tag in metric.tags:
                if tag in values:
                    self._heard[metric] = values[tag]

    def begin(self, progress: Progress) -> None:
        """Say where the best checkpoint of a resumed run is, if not where it belongs."""
        standing = None if self.plan.keep is None else progress.standings.get(self.plan.keep.name)
        if standing is not None and self.plan.keep is not None and not _is_of(self.path, standing["step"]):
            what = f"the best {self.plan.keep.name} so far, {standing['value']:.4g} after step {standing['step']}"
            self.say(f"{what}, is not in {self.path}: a better one will be saved there")

    def due(self, progress: Progress, *, epoch_ended: bool) -> None:
        """Compare what was measured after this step, once: see loop.DueCall. To be called before states are saved."""
        heard, self._heard = self._heard, {}
        for metric, value in heard.items():
            before = progress.standings.get(metric.name)
            if before is not None and before["measured"] == progress.step:
                continue  # due at the end of an epoch too
            after = compared(metric, before, value, progress.step)
            progress.standings[metric.name] = after
            self._tell(metric, value, before, after, progress.step)
            if metric is self.plan.keep and (after["step"] == progress.step or self._is_in_place_of_one_missed(value)):
                about = {"ss_best_metric": metric.name, "ss_best_value": repr(value), STEP: str(progress.step)}
                self._missed = not self.save(progress, about)
                self._kept = self._kept if self._missed else value

    def _is_in_place_of_one_missed(self, value: float) -> bool:
        """Whether a better one could not be saved, and this one is better than the one that was."""
        if not self._missed or self.plan.keep is None or not math.isfinite(value):
            return False
        return self._kept is None or self.plan.keep.is_better(value, self._kept)

    def _tell(self, metric: Metric, value: float, before: Standing | None, after: Standing, step: int) -> None:
        if after["step"] == step:
            than = "" if before is None else f", before {before['value']:.4g} after step {before['step']}"
            self.say(f"step {step}: {metric.name} {value:.4g} is the best so far{than}")
        elif after["step"]:
            than = f"{after['value']:.4g} after step {after['step']}"
            waited = counted(after["waited"], "measurement")
            self.say(f"step {step}: {metric.name} {value:.4g} is no better than {than}, {waited} ago")

    def is_over(self, progress: Progress) -> bool:
        """Whether the run should stop."""
        return is_over(self.plan, progress.standings)

    def report(self, progress: Progress, steps: int) -> Iterator[str]:
        """Lines for the end of the run, which was to have `steps` steps."""
        stop, keep = self.plan.stop, self.plan.keep
        if stop is not None and self.is_over(progress):
            waited = counted(progress.standings[stop.name]["waited"], "measurement")
            yield (
                f"stopped early after step {progress.step} of {steps}: {stop.name} has not become better in {waited} "
                "(--early_stop)"
            )
        for metric in self.plan.metrics:
            standing = progress.standings.get(metric.name)
            if standing is None or not standing["step"]:
                yield f"{metric.name} was never measured, or never finite"
                continue
            where = f": {self.path}" if metric is keep and _is_of(self.path, standing["step"]) else ""
            since = counted(standing["waited"], "measurement")
            better = f"; it stopped getting better there, {since} ago" if standing["waited"] else ""
            yield f"{metric.name} was best after step {standing['step']}, {standing['value']:.4g}{where}{better}"


def compared(metric: Metric, before: Standing | None, value: float, step: int) -> Standing:
    """The standing of a metric after a measurement. A value that is not finite is never better; with step 0 there was
    no finite one yet."""
    is_first = before is None or not before["step"]
    if math.isfinite(value) and (is_first or before is None or metric.is_better(value, before["value"])):
        return {"value": value, "step": step, "waited": 0, "measured": step}
    if before is None:
        return {"value": 0.0, "step": 0, "waited": 1, "measured": step}
    return {**before, "waited": before["waited"] + 1, "measured": step}


def _is_of(path: Path, step: int) -> bool:
    """Whether a checkpoint is there that was saved after `step`, as far as its format tells."""
    if not path.exists():
        return False
    try:
        return int(read_header(path).metadata.get(STEP, step)) == step
    except (OSError, ValueError, CheckpointError):
        return True
