"""The plan of the moving average: decays from horizons, the rising decay, and what cannot be averaged."""

from __future__ import annotations

import pytest

from library.options.groups.averaging import AveragingOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.mistakes import Mistakes, UserError
from library.training.averaging.plan import EmaPlan, decide_ema
from library.training.optim.optimizers import choose_optimizer


def decided(steps: int = 1000, optimizer: str = "AdamW", **flags: object) -> EmaPlan:
    mistakes = Mistakes()
    options = AveragingOptions(use_ema=True, **flags)  # type: ignore[arg-type]
    plan = decide_ema(options, steps, choose_optimizer(OptimizerOptions(optimizer_type=optimizer)), mistakes)
    mistakes.raise_if_any()
    assert plan is not None
    return plan


@pytest.mark.parametrize(
    ("flags", "age"),
    [
        ({}, 100),
        ({"ema_horizon": 0.05}, 50),
        ({"ema_horizon": 1.0}, 1000),
        ({"ema_horizon": 30}, 30),
        ({"ema_horizon": 1}, 1),
    ],
)
def test_the_mean_age_of_the_weights_is_the_horizon(flags: dict[str, object], age: float) -> None:
    """The weights of k steps ago have the share (1 - d) d^k: their mean age is the sum of k (1 - d) d^k."""
    decay = decided(**flags).decay
    assert sum(k * (1 - decay) * decay**k for k in range(60 * int(age) + 60)) == pytest.approx(age, rel=1e-6)


def test_a_decay_is_taken_as_it_is() -> None:
    assert decided(ema_decay=0.9993).decay == 0.9993


def test_the_decay_rises_and_counts_steps() -> None:
    """(1 + m) / (10 + m): 2/11, 11/20 and 101/110 at m = 1, 10 and 100."""
    plan = decided(ema_decay=0.999, ema_warmup_steps=0.05)
    assert [plan.decay_at(step) for step in (1, 50, 51, 60, 150)] == pytest.approx([0, 0, 2 / 11, 11 / 20, 101 / 110])
    assert plan.decay_at(100_000) == 0.999
    assert decided(ema_decay=0.999, ema_update_interval=10).decay_at(100_000) == pytest.approx(0.999**10)


def test_the_plan_says_when_the_decay_is_reached() -> None:
    """(1 + n) / (10 + n) >= 0.9 from n = 80 on."""
    assert "decay 0.9, mean age 9 steps, reached after step 80, kept in CPU memory" in decided(ema_decay=0.9).describe(
        1000
    )
    assert "does not reach (at its end 0.9911)" in decided(ema_decay=0.9999).describe(1000)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"optimizer": "AdamWScheduleFree"}, "--use_ema with AdamWScheduleFree: this optimizer averages the weights"),
        ({"optimizer": "schedulefree.AdamWScheduleFree"}, "averages the weights itself"),
        ({"ema_update_interval": 1001}, "--ema_update_interval 1001: the run has 1000 steps"),
        ({"ema_warmup_steps": 1000}, "--ema_warmup_steps 1000: the run has 1000 steps, so nothing would be averaged"),
    ],
)
def test_what_cannot_be_averaged(flags: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        decided(**flags)  # type: ignore[arg-type]
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "saved", "shown"),
    [
        ({}, ("", "_ema"), ("", "_ema")),
        ({"ema_save": "only", "ema_validation": "ema_only"}, ("_ema",), ("_ema",)),
        ({"ema_save": "none", "ema_validation": "none"}, ("",), ("",)),
    ],
)
def test_what_the_average_is_used_for(flags: dict[str, object], saved: tuple[str, ...], shown: tuple[str, ...]) -> None:
    plan = decided(**flags)
    assert (plan.saved, plan.shown) == (saved, shown)
