"""The error of each value against the reference's literal values and its formulas in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from library.objective.huber import ElementLoss
from library.objective.loss import per_sample_loss
from library.objective.masking import MaskSettings
from library.objective.process import VariancePreserving
from library.options.groups.objective import ObjectiveOptions

PROCESS = VariancePreserving.scaled_linear()
STEPS = torch.tensor([0, 100, 250, 500, 750, 999])
THRESHOLDS = {
    "constant": [0.1] * 6,
    "exponential": [1.0, 0.794328, 0.562341, 0.316228, 0.177828, 0.100231],
    "snr": [0.949710, 0.598297, 0.412964, 0.231284, 0.134613, 0.103691],
}


def rho(kind: str, d: float, c: float) -> float:
    loss = ElementLoss(kind, "constant", c)  # type: ignore[arg-type]
    return loss.at(PROCESS, torch.tensor([0]))(torch.tensor([[d]])).item()


@pytest.mark.parametrize("schedule", THRESHOLDS)
def test_thresholds_have_the_published_values(schedule) -> None:
    c = ElementLoss("huber", schedule, 0.1).thresholds(PROCESS, STEPS)
    assert c.dtype == torch.float32 and c.shape == (6,)
    assert c.tolist() == pytest.approx(THRESHOLDS[schedule], rel=1e-5)


@pytest.mark.parametrize("schedule", THRESHOLDS)
def test_the_scale_counts_with_every_schedule(schedule) -> None:
    c = ElementLoss("huber", schedule, 0.1, 2.5).thresholds(PROCESS, STEPS)
    assert c.tolist() == pytest.approx([2.5 * value for value in THRESHOLDS[schedule]], rel=1e-5)


def test_errors_have_the_published_values() -> None:
    assert rho("huber", 0.1, 0.1) == pytest.approx(0.00828427, rel=1e-5)
    assert rho("smooth_l1", 0.1, 0.1) == pytest.approx(0.0828427, rel=1e-5)
    assert rho("huber", 1.0, 0.1) == pytest.approx(0.180998, rel=1e-5)
    assert rho("smooth_l1", 1.0, 0.1) == pytest.approx(1.80998, rel=1e-5)
    assert rho("huber", 1.0, 0.5) == pytest.approx(0.618034, rel=1e-5)
    assert rho("smooth_l1", 1.0, 0.5) == pytest.approx(1.23607, rel=1e-5)
    assert rho("l1", -0.3, 0.1) == pytest.approx(0.3)
    assert rho("l2", -0.3, 0.1) == pytest.approx(0.09)


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_small_errors_are_not_lost_to_rounding(kind) -> None:
    """2 c (sqrt(d^2 + c^2) - c) in float32 is 0 for d = 1e-4, c = 1."""
    exact = 2.0 * (np.sqrt(np.float64(1e-8) + 1.0) - 1.0)
    assert rho(kind, 1e-4, 1.0) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("kind", ["l1", "l2", "huber", "smooth_l1"])
@pytest.mark.parametrize("c", [1e-30, 0.1, 1e30])
def test_gradients_are_finite_everywhere(kind, c) -> None:
    d = torch.tensor([[0.0, 1e-20, 1e-3, 1.0, -50.0]], requires_grad=True)
    losses = ElementLoss(kind, "constant", c).at(PROCESS, torch.tensor([3]))(d)
    losses.sum().backward()
    assert losses.isfinite().all() and d.grad is not None and d.grad.isfinite().all()


def test_thresholds_are_finite_and_the_least_where_nothing_but_noise_is() -> None:
    c = ElementLoss("huber", "snr", 0.1).thresholds(PROCESS.zero_terminal(), torch.tensor([999]))
    assert c.tolist() == pytest.approx([0.1], rel=1e-6)


@pytest.mark.parametrize("kind", ["l1", "l2", "huber", "smooth_l1"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_of_samples_by_plain_numpy(kind, masked) -> None:
    """Masks weigh the errors and not the differences; each sample has the threshold of its own timestep."""
    generator = torch.Generator().manual_seed(5)
    output, target = torch.randn(6, 4, 5, 3, generator=generator), torch.randn(6, 4, 5, 3, generator=generator)
    mask = torch.rand(6, 1, 5, 3, generator=generator) if masked else None
    found = per_sample_loss(output, target, mask, MaskSettings(), ElementLoss(kind, "snr", 0.1).at(PROCESS, STEPS))

    d = output.numpy().astype(np.float64) - target.numpy()
    c = np.array(THRESHOLDS["snr"]).reshape(6, 1, 1, 1)
    root = np.sqrt(d**2 + c**2) - c
    errors = {"l1": np.abs(d), "l2": d**2, "huber": 2 * c * root, "smooth_l1": 2 * root}[kind]
    weights = 1.0 if mask is None else mask.numpy().astype(np.float64)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), (weights * errors).mean(axis=(1, 2, 3)), rtol=2e-5)


def test_of_the_options() -> None:
    assert ElementLoss.from_options(ObjectiveOptions()) == ElementLoss()
    options = ObjectiveOptions(loss_type="smooth_l1", huber_schedule="exponential", huber_c=0.2, huber_scale=3.0)
    assert ElementLoss.from_options(options) == ElementLoss("smooth_l1", "exponential", 0.2, 3.0)
    with pytest.raises(ValueError, match="l3"):
        ElementLoss.from_options(ObjectiveOptions(loss_type="l3"))
