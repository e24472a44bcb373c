"""A fused backward pass is the step with all gradients, bit for bit, for every optimizer that steps by tensor."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from library.training.optim.optimizer_table import OPTIMIZERS
from library.training.update import fused, stepping
from library.training.update.fused import ByGroup, FusedBackward, build_backward
from library.training.update.plan import UpdatePlan
from library.training.update.stepping import build_stepping
from tests.training.optim.test_optimizers import Toy, bits, options

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

PER_TENSOR = [row.name for row in OPTIMIZERS if row.per_tensor]
ACCELERATOR: Any = SimpleNamespace(backward=lambda loss, **how: loss.backward(**how), scaler=None)
ACCELERATOR.unscale_gradients = lambda: None
CLIPPED = 0.5
"""A limit that clips every step of the toy."""


@pytest.fixture(autouse=True)
def _small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy has 6240 + 776 values: several portions."""
    monkeypatch.setattr(stepping, "AT_ONCE", 3000)
    monkeypatch.setattr(fused, "AT_ONCE", 700)


class Trained:
    """The toy with the calls that the loop makes."""

    def __init__(self, name: str, plan: UpdatePlan, limit: float, dtype: torch.dtype = torch.float32) -> None:
        self.toy = Toy(options(name), dtype)
        self.stepping = build_stepping(self.toy.optimizer, plan, seed=7)
        self.stepping.allocate()
        plan = replace(plan, max_grad_norm=limit)
        self.backward = build_backward(ACCELERATOR, self.toy.optimizer, self.stepping, plan)
        self.alive: list[int] = []  # values in gradients, each time that one more is complete
        weights: Any = self.toy.weights()
        self.handles = [
            weight.register_post_accumulate_grad_hook(lambda _: self.alive.append(self.gradients()))
            for weight in weights
        ]

    def gradients(self) -> int:
        return sum(weight.numel() for weight in self.toy.weights() if weight.grad is not None)

    def step(self, factor: float = 1.0, spoil: float = 1.0) -> bool:
        """One step, if loss and gradients are finite. False: they were not, when it was too late."""
        hidden = checkpoint(lambda inputs: torch.tanh(self.toy.parts[0](inputs)), self.toy.inputs, use_reentrant=False)
        loss = (self.toy.parts[1](hidden).float() - self.toy.targets.float()).square().mean() * spoil
        self.backward.add(loss)
        trained = [weight for weight in self.toy.weights() if weight.requires_grad]
        norm = self.backward.measure(trained)
        is_finite = norm is None or bool(norm.isfinite())
        if is_finite:
            is_finite = self.backward.finish(norm, factor)
            self.toy.optimizer.step()
        self.backward.clear()
        return is_finite

    def groups(self) -> list[dict[str, Any]]:
        return [{key: group[key] for key in group if key != "params"} for group in self.toy.optimizer.param_groups]


@pytest.mark.parametrize("name", PER_TENSOR)
def test_fused_is_unfused(name: str) -> None:
    """Weights and what a group counts, by the global norm and without, in groups and as they come; bf16 weights too."""
    for dtype, rounding in ((torch.float32, None), (torch.bfloat16, "stochastic")):
        for limit in (CLIPPED, 0.0):
            plans = [
                UpdatePlan(rounding=rounding, fuses=fuses, groups=groups, two_passes=fuses and limit > 0)  # type: ignore[arg-type]
                for fuses, groups in ((False, 0), (True, 0), (True, 3))
            ]
            runs = [Trained(name, plan, limit, dtype) for plan in plans]
            for step in range(3):
                assert all(run.step(1.25 if step == 1 else 1.0) for run in runs)
            whole, *others = runs
            for run in others:
                assert bits(run.toy.weights()) == bits(whole.toy.weights())
                assert run.groups() == whole.groups()
                assert not run.gradients()


def test_gradients_are_never_all_there() -> None:
    whole = Trained("AdamW", UpdatePlan(), 0)
    one = Trained("AdamW", UpdatePlan(fuses=True), 0)
    two = Trained("AdamW", UpdatePlan(fuses=True, two_passes=True), CLIPPED)
    for run in (whole, one, two):
        run.step()
    largest = 64 * 96
    assert max(whole.alive) == largest + 96 + 96 * 8 + 8
    assert max(one.alive) <= largest + 700 and max(two.alive) <= largest + 700
    assert len(two.alive) == 2 * len(one.alive)


def test_a_part_that_is_trained_no_longer_and_weights_without_a_gradient() -> None:
    plans = (UpdatePlan(), UpdatePlan(fuses=True, groups=2), UpdatePlan(fuses=True))
    runs = [Trained("AdamW", plan, 0) for plan in plans]
    for run in runs:
        run.step()
        for weight in run.toy.parts[0].parameters():
            weight.requires_grad = False
        run.step()
        run.toy.parts[1].bias.requires_grad = False  # of a group that is not complete then
        run.step()
    assert bits(runs[0].toy.weights()) == bits(runs[1].toy.weights()) == bits(runs[2].toy.weights())


def test_each_tensor_by_its_own_norm_is_what_sd_scripts_do() -> None:
    """Gradients of norms 2 and 0.2, clipped to 1: together to .995 and .0995, by tensor to 1 and 0.2."""
    for by_tensor, expected in ((False, (0.995037, 0.0995037)), (True, (1.0, 0.2))):
        weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
        optimizer = torch.optim.SGD(weights, lr=1.0)
        plan = UpdatePlan(1.0, fuses=True, two_passes=not by_tensor, clips_by_tensor=by_tensor)
        backward = build_backward(ACCELERATOR, optimizer, build_stepping(optimizer, plan, 0), plan)
        backward.add(2 * weights[0].sum() + 0.2 * weights[1].sum())
        assert backward.finish(backward.measure(weights), 1.0)
        assert [-weight.item() for weight in weights] == pytest.approx(expected, rel=1e-5)


def test_two_passes_leave_weights_alone_if_a_gradient_is_not_finite_and_one_pass_tells_of_it() -> None:
    two = Trained("AdamW", UpdatePlan(fuses=True, two_passes=True), CLIPPED)
    two.step()
    before = bits(two.toy.weights())
    assert not two.step(spoil=float("nan"))
    assert bits(two.toy.weights()) == before and not two.gradients()
    assert two.step()
    one = Trained("AdamW", UpdatePlan(fuses=True), 0)
    assert one.step() and not one.step(spoil=float("inf"))


def test_groups_are_about_equal_and_in_order() -> None:
    weights = [torch.nn.Parameter(torch.zeros(size)) for size in (4, 4, 1, 1, 1, 5, 2)]
    groups = ByGroup(weights, 3)
    groups.begin()
    taken = [[each.numel() for each in groups.add(weight)] for weight in reversed(weights)]
    assert taken == [[2], [], [], [], [5, 1, 1, 1], [], [4, 4]]


def test_a_second_batch_of_a_step_is_refused() -> None:
    run = Trained("AdamW", UpdatePlan(fuses=True), 0)
    assert isinstance(run.backward, FusedBackward)
    run.backward.add(torch.zeros(1, requires_grad=True).sum())
    with pytest.raises(RuntimeError, match="one batch"):
        run.backward.add(torch.zeros(1, requires_grad=True).sum())


def test_weights_are_freed_with_their_run() -> None:
    """Of another run in the same process nothing is left: a hook on a weight must not hold what holds the weight."""
    run = Trained("AdamW", UpdatePlan(fuses=True), 0)
    run.step()
    weights = [weakref.ref(weight) for weight in run.toy.weights()]
    for handle in run.handles:
        handle.remove()
    del run
    gc.collect()
    assert not any(weight() is not None for weight in weights)
