"""Post-hoc EMA: what the run keeps, and any average made of it, against the average that it stands for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from library.options.groups.averaging import AveragingOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.mistakes import Mistakes, UserError
from library.training.averaging.plan import AveragesPlan, decide_averages
from library.training.averaging.posthoc import PosthocEma
from library.training.averaging.power_profiles import Profile, combine, exponent
from library.training.averaging.weights import Weights, build_weights
from library.training.optim.optimizers import choose_optimizer

CPU = torch.device("cpu")
STEPS = 60


def decided(steps: int = STEPS, optimizer: str = "AdamW", **flags: object) -> AveragesPlan:
    mistakes = Mistakes()
    chosen = choose_optimizer(OptimizerOptions(optimizer_type=optimizer))
    plan = decide_averages(AveragingOptions(**flags), steps, chosen, None, mistakes)  # type: ignore[arg-type]
    mistakes.raise_if_any()
    return plan


def begun(weight: nn.Parameter, plan: AveragesPlan) -> tuple[Weights, PosthocEma]:
    weights = build_weights(torch.optim.SGD([weight]), plan, CPU, lambda line: None)
    assert weights.posthoc is not None
    return weights, weights.posthoc


def walk() -> np.ndarray:
    """1000 weights after each of 60 steps, (60, 1000)."""
    return np.random.default_rng(3).normal(size=(STEPS, 1000)).cumsum(0).astype(np.float32) + 5


def snapshots(interval: int = 1, count: int = 20) -> dict[Profile, np.ndarray]:
    """What a run saves, with the model holding it."""
    weight = nn.Parameter(torch.zeros(1000))
    plan = decided(posthoc_ema_snapshots=count, ema_update_interval=interval)
    weights, posthoc = begun(weight, plan)
    kept = {}
    for step, values in enumerate(walk(), 1):
        weight.data.copy_(torch.from_numpy(values))
        weights.update()
        for profile in posthoc.profiles() if step in posthoc.plan.steps else ():
            with posthoc.holding(profile):
                kept[profile] = weight.detach().numpy().copy()
            assert np.array_equal(weight.detach().numpy(), values)
    return kept


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize(("width", "step"), [(0.05, 60), (0.07, 60), (0.15, 60), (0.12, 45)])
def test_an_average_of_another_width_is_made_afterwards(width: float, step: int, interval: int) -> None:
    """The average itself: each step with its part of the profile, those between two updates with that of the update."""
    kept = snapshots(interval)
    found = combine(list(kept), Profile(width, step))
    made = sum(share * average for share, average in zip(found.shares, kept.values(), strict=True))
    ends = (np.arange(0, step + 1, interval) / step) ** (exponent(width) + 1)
    direct = np.diff(ends) @ walk()[interval - 1 : step : interval].astype(np.float64)
    assert np.linalg.norm(made - direct) / np.linalg.norm(direct) < 1e-3
    assert found.error < 0.03


def test_a_restored_pair_goes_on_bit_for_bit() -> None:
    plan = decided(posthoc_ema_snapshots=2, ema_update_interval=4)
    weight, other = nn.Parameter(torch.zeros(1000)), nn.Parameter(torch.ones(1000))
    (weights, whole), (resumed, rest) = begun(weight, plan), begun(other, plan)
    for step, values in enumerate(walk(), 1):
        weight.data.copy_(torch.from_numpy(values))
        weights.update()
        if step == 22:
            state = whole.state_dict()
            rest.load_state_dict(
                {"steps": state["steps"], "shadows": [[shadow.clone() for shadow in one] for one in state["shadows"]]}
            )
        elif step > 22:
            other.data.copy_(torch.from_numpy(values))
            resumed.update()
    assert rest.profiles() == whole.profiles() == [Profile(0.05, 60), Profile(0.1, 60)]
    for one, same in zip(whole.averages.values(), rest.averages.values(), strict=True):
        assert torch.equal(one.shadows[0], same.shadows[0])


def test_the_snapshots_are_spread_over_the_run() -> None:
    plan = decided(1000, posthoc_ema_snapshots=8).posthoc
    assert plan is not None
    assert plan.steps == (125, 250, 375, 500, 625, 750, 875, 1000) and plan.files == 16
    assert decided(10, posthoc_ema_snapshots=3).posthoc.steps == (3, 6, 10)  # type: ignore[union-attr]
    assert decided(10).posthoc is None


def test_both_kinds_of_averages_are_counted() -> None:
    assert decided().of_weights == 0 and decided(use_ema=True).of_weights == 1
    assert decided(posthoc_ema_snapshots=5).of_weights == 2
    assert decided(posthoc_ema_snapshots=5, use_ema=True).of_weights == 3
    with_delta = decided(posthoc_ema_snapshots=5, use_ema=True, ema_of="delta")
    assert with_delta.of_weights == 2 and with_delta.of_delta


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"optimizer": "AdamWScheduleFree"}, "--posthoc_ema_snapshots with AdamWScheduleFree: this optimizer averages"),
        ({"steps": 4}, "--posthoc_ema_snapshots 5: the run has only 4 steps\n    -> use at most 4"),
        ({"ema_update_interval": 20}, "the run has only 60 steps with an update every 20 steps\n    -> use at most 3"),
    ],
)
def test_what_has_no_snapshots(flags: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        decided(posthoc_ema_snapshots=5, **flags)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_an_optimizer_that_averages_is_refused_where_only_its_class_is_known() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight])
    optimizer.eval = optimizer.train = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="--posthoc_ema_snapshots: the optimizer SGD averages the weights itself"):
        build_weights(optimizer, decided(posthoc_ema_snapshots=5), CPU, lambda line: None)
