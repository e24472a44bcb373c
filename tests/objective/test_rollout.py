"""Scheduled sampling: shares, lengths, and the corrected target, against the formulas and literal values."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch

from library.objective.process import Prediction, VariancePreserving
from library.objective.rollout import RolloutSettings, gain
from library.options.groups.rollout import RolloutOptions
from library.runtime.seeds import torch_generator
from tests.objective.test_objective import Flow

PROCESS = VariancePreserving.scaled_linear()
SETTINGS = RolloutSettings(longest=2, last=1.0, stride=36)


def images(seed: int) -> torch.Tensor:
    return torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(seed))


# from the closed forms, 1 - (a_t s_s) / (a_s s_t) and (a_t / s_t) (s_t a_s - a_t s_s), in float64
GAINS = {
    (0, 40): (-5.825, -5.710), (10, 50): (-1.295, -1.257), (100, 140): (-0.2606, -0.2261),
    (400, 440): (-0.1400, -0.05488), (800, 840): (-0.2066, -0.00635),
}  # fmt: skip


@pytest.mark.parametrize(("t", "source"), GAINS)
def test_an_error_moves_the_corrected_target_by_the_gain(t: int, source: int) -> None:
    for prediction, expected in zip(("epsilon", "v"), GAINS[t, source], strict=True):
        found = gain(PROCESS, prediction, torch.tensor([t]), torch.tensor([source])).item()
        assert found == pytest.approx(expected, abs=6e-4 if abs(expected) > 1 else 6e-5)


def test_the_gain_of_a_flow() -> None:
    """(f - f_s) / f: from 0.436 down to 0.4."""
    found = gain(Flow(timesteps=1000), "v", torch.tensor([399]), torch.tensor([435])).item()
    assert found == pytest.approx(-0.09, abs=1e-4)


def test_the_corrected_target_leads_from_where_the_sample_is_to_its_image() -> None:
    """eps' = (x' - a x0) / s, v' = (a x' - x0) / s, for a flow (x' - x0) / f."""
    x0, x, t = images(1), images(2), torch.tensor([20, 500, 999])
    a, s = PROCESS.signal(t).view(3, 1, 1, 1), PROCESS.noise(t).view(3, 1, 1, 1)
    noise = PROCESS.implied_noise(x0, x, t)
    torch.testing.assert_close(PROCESS.add_noise(x0, noise, t), x)
    torch.testing.assert_close(PROCESS.target(x0, noise, t, "epsilon"), (x - a * x0) / s)
    torch.testing.assert_close(PROCESS.target(x0, noise, t, "v"), (a * x - x0) / s, rtol=1e-4, atol=1e-4)
    for prediction in ("epsilon", "v"):
        target = PROCESS.target(x0, noise, t, prediction)
        torch.testing.assert_close(PROCESS.to_x0(x, target, t, prediction), x0, rtol=1e-3, atol=1e-4)
    flow, level = Flow(timesteps=1000), ((t + 1) / 1000).view(3, 1, 1, 1)
    target = flow.target(x0, flow.implied_noise(x0, x, t), t, "v")
    torch.testing.assert_close(target, (x - x0) / level, rtol=1e-4, atol=1e-4)


def test_the_guides_settings_raise_the_share_from_0_to_its_probability() -> None:
    guide = RolloutOptions(
        scheduled_sampling_max_step_offset=10, scheduled_sampling_probability=1.0, scheduled_sampling_ramp_steps=1000
    )
    settings = RolloutSettings.from_options(guide, 1000)
    assert settings is not None and (settings.longest, settings.stride) == (10, 1)
    assert [settings.probability(step) for step in (0, 250, 500, 1000, 5000)] == [0.0, 0.25, 0.5, 1.0, 1.0]
    until = RolloutSettings.from_options(replace(guide, scheduled_sampling_prob_end=0.5), 1000)
    assert until is not None and until.probability(1000) == 0.5


def test_the_share_begins_at_its_step_and_rises_in_its_shape() -> None:
    cosine = RolloutSettings(2, last=0.8, first=0.4, ramp_steps=100, start_step=50, shape="cosine")
    shares = [cosine.probability(step) for step in (0, 49, 50, 75, 100, 125, 150, 999)]
    quarter = (1 - math.sqrt(0.5)) / 2  # of (1 - cos(pi v)) / 2 at v = 1/4
    assert shares == pytest.approx([0, 0, 0.4, 0.4 + 0.4 * quarter, 0.6, 0.8 - 0.4 * quarter, 0.8, 0.8])
    at_once = RolloutSettings(2, last=0.8, start_step=50)
    assert [at_once.probability(step) for step in (49, 50)] == [0.0, 0.8]


def test_the_stride_of_inference_is_one_step_of_an_image() -> None:
    """1000 / 28 is 35.7; 999 / 10 of another process is 99.9."""
    options = RolloutOptions(
        scheduled_sampling_max_step_offset=3,
        scheduled_sampling_probability=0.5,
        scheduled_sampling_stride="inference",
    )
    settings = RolloutSettings.from_options(options, 1000)
    assert settings is not None and settings.stride == 36
    ten = RolloutSettings.from_options(replace(options, scheduled_sampling_inference_steps=10), 999)
    assert ten is not None and ten.stride == 100


@pytest.mark.parametrize(
    "flags", [{"max_step_offset": 3}, {"probability": 0.5}, {"max_step_offset": 3, "prob_end": 0.5, "prob_start": 0.5}]
)
def test_nothing_is_rolled_without_a_share_or_a_length(flags: dict[str, float]) -> None:
    options = RolloutOptions(**{f"scheduled_sampling_{name}": value for name, value in flags.items()})  # type: ignore[arg-type]
    assert RolloutSettings.from_options(options, 1000) is None


@pytest.mark.parametrize(
    ("strategy", "expected"),
    # of K = 4 at u = 0, 0.3, 0.6, 0.9: 4 u, 4 u^2 = 0.36, 1.44, 3.24, 4 (1 - u^2)
    [("uniform", [1, 2, 3, 4]), ("biased_early", [1, 1, 2, 4]), ("biased_late", [4, 4, 3, 1])],
)
def test_lengths_follow_the_strategy(strategy: str, expected: list[int]) -> None:
    settings = RolloutSettings(4, last=1.0, strategy=strategy)  # type: ignore[arg-type]
    assert [settings.length(u) for u in (0.0, 0.3, 0.6, 0.9)] == expected
    many = [settings.length((place + 0.5) / 20000) for place in range(20000)]
    assert settings.mean_length == pytest.approx(statistics.mean(many), abs=1e-3)


def test_the_cost_is_the_mean_length_times_the_mean_share() -> None:
    """Ten of a hundred steps at 0, ninety at 0.5, with 1, 2 or 3 passes each."""
    settings = RolloutSettings(3, last=0.5, start_step=10)
    assert settings.passes_per_sample(100) == pytest.approx(0.45 * 2)


def test_a_samples_coin_and_length_are_its_own_and_the_share_changes_no_length() -> None:
    def draw(settings: RolloutSettings, places: list[int]) -> list[int]:
        return settings.draw(0, [torch_generator(7, "rollout", place) for place in places]).tolist()

    all_rolled = RolloutSettings(3, last=1.0)
    together = draw(all_rolled, list(range(400)))
    assert set(together) == {1, 2, 3}
    assert draw(all_rolled, [5, 3]) == [together[5], together[3]]
    some = draw(replace(all_rolled, last=0.25), list(range(400)))
    assert 60 < sum(length > 0 for length in some) < 140
    assert all(one in (0, other) for one, other in zip(some, together, strict=True))
    assert draw(replace(all_rolled, last=0.0), [0, 1]) == [0, 0]


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_rollout_begins_at_a_trained_timestep_and_never_amplifies_errors(prediction: Prediction) -> None:
    """The gains once more, in NumPy from the published betas."""
    table = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    a, s = np.sqrt(table), np.sqrt(1 - table)

    def allowed(t: int, source: int, high: int) -> bool:
        if source >= high:
            return False
        of = {
            "epsilon": 1 - a[t] * s[source] / (a[source] * s[t]),
            "v": a[t] / s[t] * (s[t] * a[source] - a[t] * s[source]),
        }
        return bool(abs(of[prediction]) <= 1)

    for settings in (SETTINGS, RolloutSettings(longest=10, last=1.0)):
        for high in (1000, 200):
            expected = [
                max(k for k in range(settings.longest + 1) if not k or allowed(t, t + k * settings.stride, high))
                for t in range(high)
            ]
            assert settings.longest_from(PROCESS, prediction, high).tolist() == expected
    longest = SETTINGS.longest_from(PROCESS, prediction, 1000)
    assert longest[[0, 10, 963, 964, 999]].tolist() == [0, 0, 1, 0, 0] and longest[100:900].eq(2).all()


def test_with_zero_terminal_snr_a_rollout_may_begin_with_pure_noise() -> None:
    longest = SETTINGS.longest_from(PROCESS.zero_terminal(), "v", 1000)
    assert longest[[927, 963]].tolist() == [2, 1]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            RolloutSettings(10, last=1.0, ramp_steps=1000),
            "rollout of 0% to 100% (linear from step 0 to 1000, 40% at the end of this run) of the samples over 1 to "
            "10 steps of 1 timestep (uniform) with unipc, corrected target",
        ),
        (
            RolloutSettings(1, last=0.5, stride=36, start_step=5, sampler="euler", corrected=False),
            "rollout of 50% (after step 5) of the samples over 1 step of 36 timesteps with euler, original target",
        ),
    ],
)
def test_the_plan_says_it(settings: RolloutSettings, text: str) -> None:
    assert settings.describe(400) == text
