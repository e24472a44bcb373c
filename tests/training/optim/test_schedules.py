"""Schedules against plain formulas, in optimizer steps; mistakes and notes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from library.options.groups.optimizer import LR_SCHEDULERS, OptimizerOptions
from library.options.mistakes import UserError
from library.training.optim.optimizers import ExactState, choose_optimizer, make_optimizer
from library.training.optim.schedules import (
    SCHEDULES,
    ScheduleChoice,
    choose_schedule,
    count_steps,
    make_schedule,
    try_out,
)

TOTAL, WARMUP, RATE = 50, 10, 0.01


def options(name: str = "constant", warmup: int | float = WARMUP, **others: Any) -> OptimizerOptions:
    return OptimizerOptions(learning_rate=RATE, lr_scheduler=name, lr_warmup_steps=warmup, **others)


def chosen(asked: OptimizerOptions, total: int = TOTAL) -> ScheduleChoice:
    return choose_schedule(asked, total, choose_optimizer(asked))


def run(asked: OptimizerOptions, total: int = TOTAL) -> list[float]:
    """The rate of each optimizer step, relative to learning_rate, and the one after the last."""
    choice = chosen(asked, total)
    assert not choice.mistakes, choice.mistakes
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = make_optimizer(choose_optimizer(asked), [{"params": [parameter], "lr": RATE}])
    schedule = make_schedule(choice, optimizer)
    rates = []
    for _ in range(total + 1):
        rates.append(optimizer.param_groups[0]["lr"] / RATE)
        parameter.grad = torch.ones(1)
        optimizer.step()
        schedule.step()
    return rates


def ramp(n: int) -> float | None:
    return n / WARMUP if n < WARMUP else None


def progress(n: int) -> float:
    return (n - WARMUP) / (TOTAL - WARMUP)


def stable_decay(n: int) -> float:
    """Up from a tenth within 10 steps, stable until step 30, then a half cosine over 20 steps down to a tenth."""
    if n < WARMUP:
        return n / WARMUP * 0.9 + 0.1
    if n < TOTAL - 20:
        return 1.0
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (n - 30) / 20)) if n < TOTAL else 0.1


CASES: dict[str, tuple[OptimizerOptions, Callable[[int], float]]] = {
    "linear": (options("linear"), lambda n: 1 - progress(n)),
    "cosine": (options("cosine"), lambda n: 0.5 * (1 + math.cos(math.pi * progress(n)))),
    "cosine_with_restarts": (
        options("cosine_with_restarts", lr_scheduler_num_cycles=3),
        lambda n: 0.5 * (1 + math.cos(math.pi * (3 * progress(n) % 1))) if n < TOTAL else 0.0,
    ),
    "polynomial": (
        options("polynomial", lr_scheduler_power=2.0),
        lambda n: ((RATE - 1e-7) * (1 - progress(n)) ** 2 + 1e-7) / RATE,
    ),
    "constant": (options("constant", 0), lambda n: 1.0),
    "constant_with_warmup": (options("constant_with_warmup"), lambda n: 1.0),
    "inverse_sqrt": (
        options("inverse_sqrt", lr_scheduler_timescale=25),
        lambda n: 1 / math.sqrt((n + 25 - WARMUP) / 25),
    ),
    "cosine_with_min_lr": (
        options("cosine_with_min_lr", lr_scheduler_min_lr_ratio=0.1),
        lambda n: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress(n))),
    ),
    "warmup_stable_decay": (
        options("warmup_stable_decay", lr_decay_steps=20, lr_scheduler_min_lr_ratio=0.1),
        stable_decay,
    ),
    "piecewise_constant": (
        options("piecewise_constant", 0, lr_scheduler_args=("step_rules=1:10,0.1:20,0.05",)),
        lambda n: 1.0 if n < 10 else 0.1 if n < 20 else 0.05,
    ),
}


def test_the_table_has_the_choices_of_the_option() -> None:
    assert sorted(row.name for row in SCHEDULES) == sorted(LR_SCHEDULERS)
    assert set(CASES) | {"adafactor"} == set(LR_SCHEDULERS)


@pytest.mark.parametrize("name", CASES)
def test_the_rate_follows_the_formula(name: str) -> None:
    asked, formula = CASES[name]
    for n, rate in enumerate(run(asked)):
        warming = ramp(n) if asked.lr_warmup_steps and name != "warmup_stable_decay" else None
        expected = formula(n) if warming is None else warming
        assert rate == pytest.approx(expected, abs=1e-9), n


def test_a_constant_rate_with_a_warm_up_means_constant_with_warmup() -> None:
    choice = chosen(options("constant", 0.1))
    assert choice.name == "constant_with_warmup" and choice.warmup_steps == 5
    assert len(choice.notes) == 1 and "constant_with_warmup" in choice.notes[0]
    assert run(options("constant", 0.1))[:7] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 1])
    assert not chosen(options("constant", 0)).notes


@pytest.mark.parametrize(
    ("value", "total", "steps"),
    [
        (0, 100, 0),
        (0.0, 100, 0),
        (10, 100, 10),
        (0.1, 100, 10),
        (0.29, 100, 29),
        (0.1, 1600, 160),
        (1, 100, 1),
        (1.0, 100, 100),
        (20.0, 100, 20),
        (0.1, 5, 0),
    ],
)
def test_steps_are_numbers_or_shares(value: int | float, total: int, steps: int) -> None:
    assert count_steps(value, total) == steps


def test_a_fraction_above_1_is_refused() -> None:
    assert chosen(options("cosine", 1.5)).mistakes
    assert not chosen(options("cosine", 2.0)).mistakes


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (options("cosine", TOTAL + 1), "the run has 50"),
        (options("polynomial", TOTAL), "the run has 50"),
        (options("warmup_stable_decay", lr_decay_steps=45), "10 + 45"),
        (options("adafactor", 0), "--optimizer_type Adafactor"),
        (options("adafactor", 0, optimizer_type="Adafactor", optimizer_args=("relative_step=False",)), "relative_step"),
        (options("piecewise_constant", 0, lr_scheduler_args=("step_rules=1:10:3,2",)), "cannot be read"),
        (options("piecewise_constant", 0, lr_scheduler_args=("step_rules=1:20,0.1:10,0.01",)), "do not increase"),
        (options("piecewise_constant", lr_scheduler_args=("step_rules=1:10,0.1",)), "no warm-up"),
        (options("polynomial", lr_scheduler_args=("lr_end=0.5",)), "falls to 0.5"),
        (options("cosine", lr_scheduler_args=("powr=2",)), "powr"),
        (options("polynomial", lr_scheduler_args=("lr_end=low",)), "is not a number"),
        (options("warmup_stable_decay", lr_decay_steps=5, lr_scheduler_args=("decay_type=1",)), "is not a text"),
        (options("constant", 0, lr_scheduler_type="StepLR"), "needs step_size"),
        (options("constant", 0, lr_scheduler_type="StepLR", lr_scheduler_args=("step_size=2.5",)), "a whole number"),
        (options("cosin"), "did you mean cosine?"),
        (options("constant", 10, lr_scheduler_type="StepLR", lr_scheduler_args=("step_size=3",)), "has no effect with"),
        (options("constant", 0, lr_scheduler_type="no_such_package.Some"), "not installed"),
        (options("constant", 0, lr_scheduler_type="NoSuchLR"), "NoSuchLR"),
        (options("constant", 0, lr_scheduler_type="ReduceLROnPlateau"), "validation loss"),
        (options("constant", 0, lr_scheduler_type="StepLR", lr_scheduler_args=("step_sise=3",)), "step_size"),
    ],
)
def test_mistakes_have_remedies(asked: OptimizerOptions, says: str) -> None:
    (mistake,) = chosen(asked).mistakes
    assert says in str(mistake) and mistake.remedy


def test_several_mistakes_are_reported_together() -> None:
    assert len(chosen(options("polynomial", TOTAL + 1, lr_scheduler_args=("foo=1", "lr_end=1"))).mistakes) == 3


@pytest.mark.parametrize(
    "unused",
    [
        {"lr_scheduler_power": 2.0},
        {"lr_scheduler_num_cycles": 4},
        {"lr_scheduler_timescale": 5},
        {"lr_scheduler_min_lr_ratio": 0.1},
        {"lr_decay_steps": 3},
    ],
)
def test_an_unused_option_gives_a_note(unused: dict[str, Any]) -> None:
    (note,) = chosen(options("cosine", **unused)).notes
    assert next(iter(unused)) in note
    assert not chosen(options("cosine", lr_scheduler_power=1, lr_scheduler_num_cycles=1)).notes


def test_arguments_reach_the_schedule() -> None:
    lower = run(options("polynomial", lr_scheduler_args=("lr_end=1e-4",)))
    assert lower[TOTAL] == pytest.approx(0.01)
    for given in ("min_lr=0.002", "min_lr_rate=0.2"):
        assert run(options("cosine_with_min_lr", lr_scheduler_args=(given,)))[TOTAL] == pytest.approx(0.2)


def test_any_class_can_be_named() -> None:
    for name in ("CosineAnnealingLR", "torch.optim.lr_scheduler.CosineAnnealingLR"):
        asked = options("cosine", 0, lr_scheduler_type=name, lr_scheduler_args=("T_max=50", "eta_min=0.001"))
        rates = run(asked)
        expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * n / 50)) for n in range(51)]
        assert rates == pytest.approx(expected, abs=1e-9)
        assert chosen(asked).name == name


@pytest.fixture
def own_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of schedules as users write them: without LRScheduler.__init__, and without some of its methods."""
    (tmp_path / "own_schedules.py").write_text(
        """
from torch.optim.lr_scheduler import LRScheduler


class Halving(LRScheduler):
    def __init__(self, optimizer, last_epoch=0):
        self.optimizer, self.last_epoch = optimizer, last_epoch
        self.rates = self._last_lr = [group["lr"] for group in optimizer.param_groups]

    def get_lr(self):
        return [rate * 0.5**self.last_epoch for rate in self.rates]


class FirstStepByItself(Halving):
    def __init__(self, optimizer):
        super().__init__(optimizer, -1)
        self._initial_step()


class OnlySteps:
    def __init__(self, optimizer):
        pass

    def step(self):
        pass


class FailsLater(Halving):
    def get_lr(self):
        return self.no_such_thing
""",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "own_schedules"


@pytest.mark.parametrize("name", ["Halving", "FirstStepByItself"])
def test_a_class_that_does_not_call_torchs_own_start_works(own_classes: str, name: str) -> None:
    """torch's step() reads an attribute that its __init__ sets; the restarts of LETS do not call it."""
    rates = run(options("constant", 0, lr_scheduler_type=f"{own_classes}.{name}"), 4)
    assert rates == [1.0, 0.5, 0.25, 0.125, 0.0625]


@pytest.mark.parametrize(("name", "why"), [("OnlySteps", "state_dict"), ("FailsLater", "no_such_thing")])
def test_a_class_that_fails_at_its_first_step_is_refused_before(own_classes: str, name: str, why: str) -> None:
    asked = options("constant", 0, lr_scheduler_type=f"{own_classes}.{name}")
    with pytest.raises(UserError, match=f"{name} cannot be used: AttributeError: .*{why}"):
        try_out(choose_optimizer(asked), chosen(asked), RATE)


def test_a_class_that_refuses_its_arguments_is_a_user_error() -> None:
    asked = options("constant", 0, lr_scheduler_type="MultiStepLR", lr_scheduler_args=("milestones=5",))
    choice = chosen(asked)
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = make_optimizer(choose_optimizer(asked), [{"params": [parameter], "lr": RATE}])
    with pytest.raises(UserError, match="milestones"):
        make_schedule(choice, optimizer)


def test_adafactors_relative_step_shows_its_own_rate() -> None:
    asked = options("cosine", 0, optimizer_type="Adafactor", lr_scheduler_args=("num_cycles=2",))
    choice = chosen(asked)
    assert choice.name == "adafactor" and not choice.mistakes
    assert any("no effect" in note for note in choose_optimizer(asked).notes)
    parameter = torch.nn.Parameter(torch.full((3,), 2.0))
    optimizer = make_optimizer(choose_optimizer(asked), [{"params": [parameter], "lr": RATE}])
    schedule = make_schedule(choice, optimizer)
    assert schedule.get_last_lr() == [RATE]
    for _ in range(3):
        parameter.grad = torch.ones(3)
        optimizer.step()
        schedule.step()
    # min(1e-2, 1/sqrt(step)) times the root mean square of the parameter
    assert schedule.get_last_lr()[0] == pytest.approx(0.02, rel=0.03)

    (note,) = chosen(options("cosine", 0.1, optimizer_type="Adafactor")).notes
    assert "lr_warmup_steps" in note and "warmup_init" in note
    with_rate = options("cosine", 0.1, optimizer_type="Adafactor", optimizer_args=("relative_step=False",))
    assert chosen(with_rate).name == "cosine"


def test_schedule_free_optimizers_keep_their_rate_after_the_warm_up() -> None:
    asked = options("cosine", 0, optimizer_type="AdamWScheduleFree")
    choice = chosen(asked)
    assert choice.name == "constant" and "no effect" in choice.notes[0]
    assert run(asked) == [1.0] * (TOTAL + 1)
    warmed = options("cosine", 10, optimizer_type="AdamWScheduleFree")
    assert run(warmed)[:12] == pytest.approx([n / 10 for n in range(11)] + [1.0])
    assert not chosen(options("constant", 0, optimizer_type="AdamWScheduleFree")).notes


@pytest.mark.parametrize("name", [*CASES, "adafactor", "OneCycleLR"])
def test_a_resumed_schedule_continues_bit_for_bit(name: str) -> None:
    if name == "adafactor":
        asked = options("cosine", 0, optimizer_type="Adafactor")
    elif name == "OneCycleLR":
        asked = options("constant", 0, lr_scheduler_type=name, lr_scheduler_args=("max_lr=0.1", "total_steps=60"))
    else:
        asked = CASES[name][0]

    def build() -> tuple[torch.nn.Parameter, Any, Any]:
        parameter = torch.nn.Parameter(torch.linspace(1, 2, 5))
        optimizer = make_optimizer(choose_optimizer(asked), [{"params": [parameter], "lr": RATE}])
        return parameter, optimizer, make_schedule(chosen(asked), optimizer)

    def steps(world: tuple[torch.nn.Parameter, Any, Any], count: int) -> list[float]:
        parameter, optimizer, schedule = world
        rates = []
        for _ in range(count):
            parameter.grad = parameter.detach() * 0.5
            optimizer.step()
            schedule.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    whole = build()
    steps(whole, 23)
    resumed = build()
    with torch.no_grad():
        resumed[0].copy_(whole[0])
    ExactState(resumed[1]).load_state_dict(copy.deepcopy(whole[1].state_dict()))
    resumed[2].load_state_dict(copy.deepcopy(whole[2].state_dict()))
    assert steps(resumed, 20) == steps(whole, 20)
    assert torch.equal(resumed[0], whole[0])


def test_every_part_keeps_its_share_of_the_rate() -> None:
    asked = options("linear", 0)
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": [parameter], "lr": rate} for parameter, rate in zip(parameters, (RATE, RATE / 4), strict=True)]
    optimizer = make_optimizer(choose_optimizer(asked), groups)
    schedule = make_schedule(chosen(asked), optimizer)
    for _ in range(20):
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.6 * RATE, 0.15 * RATE])
