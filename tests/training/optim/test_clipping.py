"""Clipping by the norm of all gradients: torch's own result, and nothing done where there is nothing to do."""

from __future__ import annotations

import pytest
import torch

from library.training.optim.clipping import clip_gradients, gradient_norm


def parameters(scale: float = 1.0) -> list[torch.nn.Parameter]:
    """Parameters of 0 to 4 dimensions with gradients, and one without."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((), (7,), (5, 6), (4, 3, 3, 3), (2, 2))]
    for parameter in made[:-1]:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
    return made


def gradients(made: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in made if parameter.grad is not None]


@pytest.mark.parametrize("limit", [0.1, 1.0, 11.0, 13.0, 1000.0])
def test_clipping_equals_that_of_torch(limit: float) -> None:
    """The norm is about 12: both sides of the limit."""
    ours, theirs = parameters(), parameters()
    clip_gradients(ours, limit)
    torch.nn.utils.clip_grad_norm_(theirs, limit)
    for one, other in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_gradients_below_the_limit_are_not_touched() -> None:
    made = parameters()
    versions = [gradient._version for gradient in gradients(made)]
    clip_gradients(made, 1000.0)
    assert [gradient._version for gradient in gradients(made)] == versions


def test_a_norm_at_the_limit_is_scaled_as_torch_does() -> None:
    """limit / (norm + 1e-6) is below 1 there."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([0.001])
    clip_gradients([parameter], 0.001)
    assert parameter.grad.item() == pytest.approx(0.001 * 0.001 / 0.001001, rel=1e-5)


def test_parameters_without_gradients_are_skipped() -> None:
    clip_gradients([torch.nn.Parameter(torch.zeros(3))], 1.0)


@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_makes_all_gradients_nan(spoil: float) -> None:
    """As torch does it: the step is bad as a whole and must not look like a good one."""
    ours, theirs = parameters(), parameters()
    for made in (ours, theirs):
        assert made[2].grad is not None
        made[2].grad[0, 0] = spoil
    clip_gradients(ours, 1.0)
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    for one, other in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_the_norm_of_millions_of_numbers_keeps_its_digits() -> None:
    generator = torch.Generator().manual_seed(1)
    large = torch.randn(1000, 4000, generator=generator)
    exact = float(large.double().square().sum().sqrt())
    assert float(gradient_norm([large])) == pytest.approx(exact, rel=1e-6)


def test_the_norm_of_half_precision_is_taken_in_float32() -> None:
    """The square of 300 is beyond fp16."""
    gradient = torch.full((4, 100), 300.0, dtype=torch.float16)
    assert float(gradient_norm([gradient])) == pytest.approx(6000.0)
