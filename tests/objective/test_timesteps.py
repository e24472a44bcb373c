"""Timesteps that are drawn more often than others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from library.objective.timesteps import TimestepBias
from library.options.groups.objective import ObjectiveOptions

# strategy, what its flags are, and the slice of 1000 timesteps that diffusers' text-to-image scripts multiply
STRATEGIES = [
    ("earlier", {"timestep_bias_portion": 0.25}, slice(0, 250)),
    ("later", {"timestep_bias_portion": 0.1}, slice(-100, None)),
    ("range", {"timestep_bias_begin": 200, "timestep_bias_end": 500}, slice(200, 500)),
]


def bias(strategy: str, multiplier: float, low: int = 0, high: int = 1000, **more) -> TimestepBias | None:
    options = ObjectiveOptions(timestep_bias_strategy=strategy, timestep_bias_multiplier=multiplier, **more)
    return TimestepBias.from_options(options, low, high)


@pytest.mark.parametrize("multiplier", [0.5, 4.0])
@pytest.mark.parametrize(("strategy", "flags", "chosen"), STRATEGIES)
def test_probabilities_are_those_of_diffusers_scripts(strategy, flags, chosen, multiplier) -> None:
    weights = np.ones(1000)
    weights[chosen] *= multiplier
    found = bias(strategy, multiplier, **flags)
    assert found is not None
    np.testing.assert_allclose(found.probabilities(0, 1000).numpy(), weights / weights.sum(), rtol=1e-12)


@pytest.mark.parametrize(
    ("strategy", "flags", "chosen"),
    [
        ("earlier", {"timestep_bias_portion": 0.25}, slice(0, 50)),
        ("later", {"timestep_bias_portion": 0.25}, slice(150, 200)),
        ("range", {"timestep_bias_begin": 0, "timestep_bias_end": 350}, slice(0, 50)),
        ("range", {"timestep_bias_begin": 400, "timestep_bias_end": 900}, slice(100, 200)),
    ],
)
def test_within_a_range_of_timesteps(strategy, flags, chosen) -> None:
    """[300, 500): shares are those of the timesteps that are trained at, begin and end are timesteps."""
    weights = np.ones(200)
    weights[chosen] *= 3.0
    found = bias(strategy, 3.0, 300, 500, **flags)
    assert found is not None
    np.testing.assert_allclose(found.probabilities(300, 500).numpy(), weights / weights.sum(), rtol=1e-12)
    steps = found.draw([torch.Generator().manual_seed(seed) for seed in range(300)], 300, 500)
    assert steps.dtype == torch.int64 and steps.shape == (300,)
    assert steps.min() >= 300 and steps.max() < 500


def test_draws_have_these_probabilities() -> None:
    """[10, 20) of [5, 25) three times as often: 3/40 each against 1/40; 4000 draws, five deviations."""
    steps = TimestepBias(10, 20, 3.0).draw([torch.Generator().manual_seed(seed) for seed in range(4000)], 5, 25)
    counts = torch.bincount(steps, minlength=25)
    assert counts.sum() == 4000 and counts[:5].sum() == 0 and len(counts) == 25
    for step in range(5, 25):
        p = (3.0 if 10 <= step < 20 else 1.0) / 40
        assert abs(counts[step].item() - 4000 * p) < 5 * (4000 * p * (1 - p)) ** 0.5, step


def test_no_draw_leaves_the_range_however_small_the_share() -> None:
    for multiplier in (1e-12, 1e12):
        steps = TimestepBias(7, 8, multiplier).draw([torch.Generator().manual_seed(s) for s in range(200)], 5, 10)
        assert steps.min() >= 5 and steps.max() < 10
        assert ((steps == 7).all() if multiplier > 1 else (steps != 7).all()).item()


def test_a_bias_without_effect_is_none() -> None:
    assert bias("none", 5.0) is None
    assert bias("later", 1.0) is None
    assert bias("later", 5.0, timestep_bias_portion=1.0) is None
    assert bias("range", 5.0, timestep_bias_begin=0, timestep_bias_end=1000) is None
    assert bias("range", 5.0, 0, 200, timestep_bias_begin=300, timestep_bias_end=500) is None
