"""The versions of the weights: a schedule-free optimizer's average while shown, and those in training again after."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from library.options.groups.optimizer import OptimizerOptions
from library.training.averaging.weights import Weights
from library.training.optim.optimizer_table import OPTIMIZERS
from library.training.optim.optimizers import choose_optimizer, make_optimizer

RATE = 0.25


def trained(name: str, steps: int) -> tuple[torch.nn.Parameter, Any]:
    """A weight after steps with the gradient 1, and its optimizer."""
    weight = torch.nn.Parameter(torch.linspace(1, 2, 5))
    asked = OptimizerOptions(optimizer_type=name, learning_rate=RATE)
    optimizer = make_optimizer(choose_optimizer(asked), [{"params": [weight], "lr": RATE}])
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        Weights(optimizer).update()
    return weight, optimizer


def test_the_average_of_schedule_free_sgd() -> None:
    """x_3 = mean(z_1, z_2, z_3) with z_t = z_0 - t lr for the gradient 1 (arXiv 2405.15682, equations 3 to 5)."""
    weight, optimizer = trained("SGDScheduleFree", 3)
    with Weights(optimizer).holding(""):
        assert torch.allclose(weight, torch.linspace(1, 2, 5) - RATE * (1 + 2 + 3) / 3)


@pytest.mark.parametrize("name", [row.name for row in OPTIMIZERS if row.schedule_free])
def test_weights_are_restored_bit_for_bit(name: str) -> None:
    weight, optimizer = trained(name, 6)
    before = weight.detach().clone()
    with Weights(optimizer).holding(""):
        assert not torch.equal(weight, before)
        assert not optimizer.param_groups[0]["train_mode"]
    assert torch.equal(weight, before)
    assert optimizer.param_groups[0]["train_mode"]


def test_weights_are_restored_when_saving_fails() -> None:
    weight, optimizer = trained("AdamWScheduleFree", 3)
    before = weight.detach().clone()
    with pytest.raises(OSError, match="disk full"), Weights(optimizer).holding(""):
        raise OSError("disk full")
    assert torch.equal(weight, before)


def test_other_optimizers_keep_the_weights_in_training() -> None:
    weight, optimizer = trained("AdamW", 1)
    before = weight.detach().clone()
    with Weights(optimizer).holding(""):
        assert torch.equal(weight, before)
    assert torch.equal(weight, before)
