"""Which checkpoint is kept, and when a run should stop: functions of what was measured, interrupted or not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
import torch

from library.checkpoints.writer import write_safetensors
from library.training.best.best import Best
from library.training.best.metrics import METRICS
from library.training.best.plan import BestPlan
from library.training.saving.state import Progress

LOSS, DINO = METRICS["validation_loss"], METRICS["dino"]
STEP_TAG, EPOCH_TAG = LOSS.tags
Measured = Sequence[tuple[int, float]]


@dataclass
class Followed:
    """A run that measures, and the steps at which it saved the best."""

    plan: BestPlan
    path: Path = Path("nowhere.safetensors")
    progress: Progress = field(default_factory=Progress)
    saved: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    full: tuple[int, ...] = ()  # steps at which the disk is full

    def __post_init__(self) -> None:
        self.best = Best(self.plan, self.save, self.path, self.said.append)

    def save(self, progress: Progress, about: Mapping[str, str]) -> bool:
        if progress.step in self.full:
            return False
        assert about["ss_best_step"] == str(progress.step) and float(about["ss_best_value"]) == self.last
        self.saved.append(progress.step)
        return True

    def measure(self, values: Measured, tag: str = STEP_TAG) -> Followed:
        for step, value in values:
            self.progress.step, self.last = step, value
            self.best.hear({"loss": 0.0, tag: value})
            self.best.due(self.progress, epoch_ended=False)
        return self


def test_after_one_that_could_not_be_saved_a_better_one_than_that_on_the_disk_is() -> None:
    followed = Followed(BestPlan(keep=LOSS), full=(2,))
    followed.measure(list(enumerate([5, 3, 4, 4.5, 2, 3], start=1)))
    assert followed.saved == [1, 3, 5]
    assert followed.progress.standings["validation_loss"]["step"] == 5


@pytest.mark.parametrize(
    ("metric", "values", "saved"),
    [
        (LOSS, [3, 2, 2, 4, 1], [1, 2, 5]),
        (DINO, [3, 2, 4, 4, 1], [1, 3]),
        (LOSS, [math.nan, 5, math.nan, math.inf, 4], [2, 5]),
        (LOSS, [math.inf, -math.inf, math.nan], []),
    ],
)
def test_what_is_better_is_kept(metric: object, values: list[float], saved: list[int]) -> None:
    assert metric in (LOSS, DINO)
    followed = Followed(BestPlan(keep=LOSS if metric is LOSS else DINO))
    followed.measure(list(enumerate(values, 1)), followed.plan.metrics[0].tags[0])
    assert followed.saved == saved


def test_a_value_that_is_logged_twice_after_a_step_counts_once() -> None:
    followed = Followed(BestPlan(keep=LOSS, stop=LOSS, patience=2))
    followed.measure([(4, 1.0)]).measure([(4, 1.0)], EPOCH_TAG)
    followed.measure([(8, 2.0)]).measure([(8, 2.0)], EPOCH_TAG)
    assert followed.saved == [4] and followed.progress.standings["validation_loss"]["waited"] == 1
    assert not followed.best.is_over(followed.progress)
    followed.measure([(12, 1.0)])  # as good is not better
    assert followed.best.is_over(followed.progress)


def test_steps_without_a_measurement_change_nothing() -> None:
    followed = Followed(BestPlan(keep=LOSS, stop=LOSS, patience=1)).measure([(1, 1.0)])
    for step in range(2, 9):
        followed.progress.step = step
        followed.best.hear({"loss/validation/step_average_ema": 0.1, "evaluation/dino": 9.0})
        followed.best.due(followed.progress, epoch_ended=False)
    assert followed.saved == [1] and not followed.best.is_over(followed.progress)


VALUES = [(step, value) for step, value in enumerate([0.9, 0.1 + 0.2, 0.3, 0.31, math.nan, 0.29, 0.4], 1)]


@pytest.mark.parametrize("at", range(len(VALUES)))
def test_a_resumed_run_goes_on_with_the_best_so_far(at: int) -> None:
    """What a state holds of it passes through JSON bit for bit: 0.1 + 0.2 is worse than 0.3."""
    plan = BestPlan(keep=LOSS, stop=LOSS, patience=2)
    whole = Followed(plan).measure(VALUES)
    first = Followed(plan).measure(VALUES[:at])
    rest = Followed(plan, progress=Progress(**json.loads(json.dumps(asdict(first.progress))))).measure(VALUES[at:])
    assert first.saved + rest.saved == whole.saved == [1, 2, 3, 6]
    assert rest.progress == whole.progress


def test_the_end_says_what_was_best_and_since_when() -> None:
    followed = Followed(BestPlan(keep=DINO, stop=LOSS, patience=2)).measure([(10, 0.5), (20, 0.6), (30, 0.7)])
    early, never, best = followed.best.report(followed.progress, 100)
    assert early.startswith("stopped early after step 30 of 100: validation_loss has not become better in 2 ")
    assert never == "dino was never measured, or never finite"
    assert best == "validation_loss was best after step 10, 0.5; it stopped getting better there, 2 measurements ago"
    assert "step 10: validation_loss 0.5 is the best so far" in followed.said[0]
    assert followed.said[2] == "step 30: validation_loss 0.7 is no better than 0.5 after step 10, 2 measurements ago"


def test_a_kept_file_of_another_step_is_told(tmp_path: Path) -> None:
    """A run that went further may have replaced it, or it is in another folder."""
    plan, path = BestPlan(keep=LOSS), tmp_path / "dog_best.safetensors"
    followed = Followed(plan, path).measure([(10, 0.5)])
    followed.said.clear()
    followed.best.begin(followed.progress)
    assert f"0.5 after step 10, is not in {path}" in followed.said.pop()
    write_safetensors(path, {"a": torch.ones(1)}, {"ss_best_step": "20"})
    followed.best.begin(followed.progress)
    assert "is not in" in followed.said.pop()
    assert str(path) not in "".join(followed.best.report(followed.progress, 10))
    write_safetensors(path, {"a": torch.ones(1)}, {"ss_best_step": "10"})
    followed.best.begin(followed.progress)
    assert not followed.said and str(path) in "".join(followed.best.report(followed.progress, 10))
