"""The moving average of the weights: its recursion, its state, and the weights in training after it was shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from library.training.averaging.ema import Ema
from library.training.averaging.plan import AveragesPlan, EmaPlan
from library.training.averaging.weight_average import WeightAverage
from library.training.averaging.weights import Weights, build_weights

CPU = torch.device("cpu")


def plan(decay: float = 0.9, interval: int = 1, warmup: int = 0) -> EmaPlan:
    return EmaPlan("weights", decay, interval, warmup, on_cpu=True, saved=("", "_ema"), shown=("_ema",))


def ema_of(weight: nn.Parameter, planned: EmaPlan) -> Ema:
    return Ema(WeightAverage([weight], CPU), planned)


def steps_of(count: int) -> np.ndarray:
    """A walk of three weights, (count + 1, 3) float32: the first weights, then those after each step."""
    return np.random.default_rng(5).normal(size=(count + 1, 3)).cumsum(0).astype(np.float32)


def averaged(walk: np.ndarray, ema: Ema, weight: nn.Parameter, first: int = 1) -> None:
    for values in walk[first:]:
        weight.data.copy_(torch.from_numpy(values))
        ema.update()


@pytest.mark.parametrize(
    ("decay", "interval", "warmup"), [(0.9, 1, 0), (0.6, 1, 5), (0.95, 3, 0), (0.95, 4, 7), (0, 1, 0)]
)
def test_the_average_is_the_recursion_of_its_formula(decay: float, interval: int, warmup: int) -> None:
    """In float64, for 40 steps: the decay of a step to the power of the interval, and a warm-up counted in steps."""
    walk = steps_of(40)
    expected = walk[0].astype(np.float64)
    for step in range(interval, 41, interval):
        since = step - warmup
        factor = min(decay, (1 + since) / (10 + since)) ** interval if since > 0 else 0.0
        expected = factor * expected + (1 - factor) * walk[step]
    weight = nn.Parameter(torch.from_numpy(walk[0].copy()))
    ema = ema_of(weight, plan(decay, interval, warmup))
    averaged(walk, ema, weight)
    np.testing.assert_allclose(ema.average.shadows[0].numpy(), expected, rtol=1e-5)


def test_an_interval_keeps_the_horizon() -> None:
    """From 0 towards a constant 1, n steps leave d^n of the way, however often the average is updated."""
    left = {}
    for interval in (1, 5):
        weight = nn.Parameter(torch.zeros(1))
        ema = ema_of(weight, plan(0.98, interval))
        ema.steps = 1000  # the rising term is above 0.98
        weight.data.fill_(1)
        for _ in range(50):
            ema.update()
        left[interval] = 1 - float(ema.average.shadows[0])
    assert left[1] == pytest.approx(0.98**50, rel=1e-4) and left[5] == pytest.approx(left[1], rel=1e-4)


def test_bf16_weights_do_not_stall_it() -> None:
    """2000 steps of 0.999 toward 1.0078125, the next number after 1 in bf16: a bf16 average would stay at 1."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    ema = ema_of(weight, plan(0.999))
    ema.steps = 10_000
    weight.data.fill_(1.0078125)
    for _ in range(2000):
        ema.update()
    assert ema.average.shadows[0].dtype == torch.float32
    assert float(ema.average.shadows[0]) == pytest.approx(1 + 0.0078125 * (1 - 0.999**2000), abs=1e-5)


def test_a_restored_average_goes_on_bit_for_bit() -> None:
    walk = steps_of(20)
    weight = nn.Parameter(torch.from_numpy(walk[0].copy()))
    ema = ema_of(weight, plan(interval=3))
    averaged(walk[:12], ema, weight)
    state = {"steps": ema.steps, "shadows": [shadow.clone() for shadow in ema.state_dict()["shadows"]]}
    averaged(walk, ema, weight, 12)
    start = nn.Parameter(torch.zeros(3))
    other = ema_of(start, plan(interval=3))
    other.load_state_dict(state)
    averaged(walk, other, start, 12)
    assert torch.equal(ema.average.shadows[0], other.average.shadows[0])


def test_a_state_of_other_weights_is_refused() -> None:
    ema = ema_of(nn.Parameter(torch.zeros(3)), plan())
    with pytest.raises(ValueError, match="other shapes"):
        ema.load_state_dict({"steps": 1, "shadows": [torch.zeros(1)]})


def test_the_model_holds_the_average_only_while_it_is_shown() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    weights = build_weights(torch.optim.SGD([weight]), AveragesPlan(plan(0.5)), CPU, lambda line: None)
    weight.data.fill_(2)
    weights.update()
    assert list(weights.shown()) == ["_ema"]
    with pytest.raises(OSError, match="disk full"), weights.holding("_ema"):
        # d_1 = 2/11: 1 * 2/11 + 2 * 9/11 = 1.8182, in bf16 1.8203125
        assert weight.tolist() == [1.8203125, 1.8203125]
        raise OSError("disk full")
    assert weight.tolist() == [2, 2]
    with weights.holding(""):
        assert weight.tolist() == [2, 2]


def test_without_an_average_there_is_one_version() -> None:
    weights = Weights(torch.optim.SGD([nn.Parameter(torch.ones(1))]))
    assert list(weights.shown()) == [""]
