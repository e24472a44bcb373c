"""Which metrics a run may follow, and what is wrong with the others."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from library.evaluation.scores import MEASURES
from library.options.groups.validation import ValidationOptions
from library.options.mistakes import Mistakes
from library.training.best.metrics import METRICS
from library.training.best.plan import BestPlan, check_best, count_measurements, read_best
from library.training.plan.duration import Duration
from library.training.saving.state import Progress, SavedState
from library.training.validation.plan import ValidationPlan
from tests.training.validation.test_validation import PAIRS, Toy, play

MEASURED = {"validation_loss": 5, "validation_divergence": 5, "training_loss": 5}


def decided(resume: SavedState | None = None, **flags: str) -> tuple[BestPlan, list[str], list[str]]:
    mistakes, notes = Mistakes(), list[str]()
    origins = defaultdict(lambda: "command line")
    plan = read_best(replace(ValidationOptions(), **flags), origins, mistakes)
    check_best(plan, origins, MEASURED, resume, mistakes, notes)
    return plan, [" ".join(str(each).split()) for each in mistakes], notes


def test_nothing_is_followed_by_default() -> None:
    assert decided() == (BestPlan(), [], [])


def test_a_metric_and_a_patience() -> None:
    plan, mistakes, notes = decided(keep_best="validation_loss", early_stop="training_loss:3")
    assert not mistakes and not notes
    assert plan == BestPlan(METRICS["validation_loss"], METRICS["training_loss"], 3)
    assert decided(early_stop=" validation_loss = 2 ")[0].patience == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"keep_best": "validation_los"}, "there is no such metric -> did you mean validation_loss?"),
        (
            {"keep_best": "beauty"},
            "--keep_best beauty (command line): there is no such metric -> use one of validation_l",
        ),
        ({"keep_best": "class_loss"}, "this run never measures it -> add regularisation images"),
        ({"keep_best": "validation_loss_ema"}, "this run measures validation_loss, validation_divergence"),
        ({"keep_best": "dino"}, "this run never measures it -> evaluate images during the training"),
        ({"early_stop": "validation_loss"}, "cannot be read -> write METRIC:PATIENCE"),
        ({"early_stop": "validation_loss:0"}, "cannot be read"),
        ({"early_stop": "validation_loss:-1"}, "cannot be read"),
        ({"early_stop": "validation_loss:many"}, "cannot be read"),
        ({"early_stop": "loss:3"}, "--early_stop loss:3 (command line): there is no such metric"),
        ({"early_stop": "class_loss:3"}, "this run never measures it"),
    ],
)
def test_what_cannot_be_followed_is_a_mistake(flags: dict[str, str], said: str) -> None:
    _, (mistake,), _ = decided(**flags)
    assert said in mistake


def test_a_patience_that_never_ends_is_noted() -> None:
    assert decided(early_stop="validation_loss:5")[2] == [
        "--early_stop validation_loss:5 never stops the run, which measures validation_loss 5 times"
    ]
    assert not decided(early_stop="validation_loss:4")[2]


def test_a_run_that_stopped_early_is_only_resumed_with_more_patience() -> None:
    progress = Progress(step=30)
    progress.standings["validation_loss"] = {"value": 0.5, "step": 10, "waited": 2, "measured": 30}
    saved = SavedState(Path("dog-state"), progress, {})
    _, (mistake,), _ = decided(saved, early_stop="validation_loss:2")
    assert "--resume dog-state: the run stopped early after step 30: validation_loss had not become better" in mistake
    assert not decided(saved, early_stop="validation_loss:3")[1] and not decided(saved)[1]


def test_how_often_a_run_measures() -> None:
    """10 steps, 4 an epoch: after steps 3, 6, 9, and after epochs 1 to 3 at steps 4, 8, 10."""
    duration = Duration(10, 3, 4, 4, "")
    plan = ValidationPlan(PAIRS, 3, 1, of_class=(1,))
    assert count_measurements(plan, None, duration, ("", "_ema")) == dict.fromkeys(
        [name + suffix for name in (*MEASURED, "class_loss") for suffix in ("", "_ema")], 6
    )
    assert count_measurements(ValidationPlan((), 4, 2, training=(1,)), None, duration, ("",)) == {"training_loss": 2}
    assert count_measurements(None, None, duration, ("",)) == {}


def test_the_directions_are_those_of_the_evaluation() -> None:
    measured = {name: measure.better for name, measure in MEASURES.items() if measure.better}
    tags = {f"evaluation/{name}" for name in measured}
    ours = {metric.name: metric for metric in METRICS.values() if metric.tags[0] in tags}
    assert {name: "higher" if metric.larger else "lower" for name, metric in ours.items()} == measured
    assert all(metric.tags == (f"evaluation/{name}",) for name, metric in ours.items())


def test_metrics_are_logged_under_their_names() -> None:
    """Whatever the plan says is measured, the validation logs."""
    plan = ValidationPlan(PAIRS, 1, 1, of_class=(1,))
    toy = Toy(plan=plan)
    toy.taken.clear()
    play(toy.make(versions={"": toy.weights, "_ema": toy.weights}))
    logged = {name for values, _ in toy.logged for name in values}
    for name in count_measurements(plan, None, Duration(10, 3, 4, 4, ""), ("", "_ema")):
        assert set(METRICS[name].tags) <= logged
