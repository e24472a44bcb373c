"""A step in portions, its state in files, and what other rooms see of it."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from library.training.averaging.weights import Weights
from library.training.optim.optimizer_table import OPTIMIZERS
from library.training.update import stepping
from library.training.update.plan import UpdatePlan
from library.training.update.stepping import Stepping, build_stepping
from tests.training.optim.test_optimizers import Toy, bits, options

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
ROWS = {row.name: row for row in OPTIMIZERS}


def made(name: str, dtype: torch.dtype = torch.float32, **plan: Any) -> tuple[Toy, Stepping]:
    toy = Toy(options(name), dtype)
    known = {"per_tensor": ROWS[name].per_tensor, "casts_state": ROWS[name].state_tensors > 0}
    return toy, build_stepping(toy.optimizer, UpdatePlan(**{**known, **plan}), seed=7)


def through_a_file(one: tuple[Toy, Stepping], other: tuple[Toy, Stepping]) -> None:
    """Bring the other to the state of the first."""
    file = io.BytesIO()
    torch.save(one[1].state_dict(), file)
    file.seek(0)
    other[1].load_state_dict(torch.load(file, weights_only=True))
    for part, twin in zip(one[0].parts, other[0].parts, strict=True):
        twin.load_state_dict(part.state_dict())


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Prodigy", "Adafactor", "SGDScheduleFree"])
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_rounded_weights_continue_from_a_state_bit_for_bit(
    name: str, rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In portions of another size too. The state is float32, and the optimizer's own parameters are the model's."""
    first = made(name, torch.bfloat16, rounding=rounding)
    for _ in range(3):
        first[0].step()
    second = made(name, torch.bfloat16, rounding=rounding)
    through_a_file(first, second)
    losses = [first[0].step() for _ in range(3)]
    monkeypatch.setattr(stepping, "AT_ONCE", 500)
    assert losses == [second[0].step() for _ in range(3)]
    assert bits(first[0].weights()) == bits(second[0].weights())
    assert all(weight.dtype == torch.bfloat16 for weight in first[0].weights())
    assert set(first[0].optimizer.state) == set(first[0].weights())
    values = [value for state in first[0].optimizer.state.values() for value in state.values()]
    assert not [value for value in values if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16]


@pytest.mark.parametrize(("before", "later"), [(None, "stochastic"), ("stochastic", None), ("stochastic", "kahan")])
def test_another_rounding_resumes(before: str | None, later: str | None) -> None:
    first, second = (made("AdamW", torch.bfloat16, rounding=rounding) for rounding in (before, later))
    first[0].step()
    through_a_file(first, second)
    assert second[0].step() == pytest.approx(first[0].step(), rel=1e-2)
    second[0].step()


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Lion"])
def test_an_offloaded_state_is_that_of_a_run_without(name: str) -> None:
    """Off, on, off again: the losses of a run that never was. (On a CPU nothing moves; the files are the same.)"""
    whole = made(name)
    losses = [whole[0].step() for _ in range(6)]
    runs = [made(name, offloads=offloads) for offloads in (False, True, False)]
    seen = []
    for place, each in enumerate(runs):
        if place:
            through_a_file(runs[place - 1], each)
        seen += [each[0].step() for _ in range(2)]
    assert seen == losses
    assert bits(whole[0].weights()) == bits(runs[-1][0].weights())


def test_what_a_schedule_free_optimizer_averages_is_rounded_once_and_put_back() -> None:
    """x = y + (z - y) (1 - 1 / beta1), of float32 z (arXiv 2405.15682); afterwards training goes on as without."""
    toy, step = made("AdamWScheduleFree", torch.bfloat16, rounding="stochastic")
    for _ in range(3):
        toy.step()
    weights = toy.weights()
    before = bits(weights)
    points = [toy.optimizer.state[weight]["z"] for weight in weights]
    assert all(z.dtype == torch.float32 for z in points)
    averages = [torch.lerp(y.float(), z, 1 - 1 / 0.9).bfloat16() for y, z in zip(weights, points, strict=True)]
    with Weights(toy.optimizer, exchanging=step.exchanging).holding(""):
        assert bits(toy.weights()) == bits(averages) != before
    assert bits(toy.weights()) == before
    assert toy.optimizer.param_groups[0]["train_mode"] and toy.step()
