"""Profiles of power-function averages: their widths, the recursion that makes them, and their best combinations."""

from __future__ import annotations

import numpy as np
import pytest

from library.training.averaging.power_profiles import WIDTHS, Profile, combine, exponent, kept_share

STEPS = 400


def sampled(profile: Profile, until: int, points: int = 200) -> np.ndarray:
    """(g + 1) tau^g / t^(g + 1) in the middle of `points` parts of each step up to `until`; 0 after t."""
    times = (np.arange(until * points) + 0.5) / points
    power = exponent(profile.width)
    density = (power + 1) * (times / profile.step) ** power / profile.step
    return np.where(times < profile.step, density, 0)


def kept(count: int, last: int = STEPS) -> list[Profile]:
    return [Profile(width, number * last // count) for number in range(1, count + 1) for width in WIDTHS]


@pytest.mark.parametrize(("width", "expected"), [(0.05, 16.97), (0.1, 6.94)])
def test_the_exponents_of_the_paper(width: float, expected: float) -> None:
    """arXiv 2312.02696, section 3.1."""
    assert exponent(width) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("width", [0.02, 0.1, 0.28])
def test_the_width_is_the_standard_deviation(width: float) -> None:
    weights = sampled(Profile(width, STEPS), STEPS) / 200
    times = (np.arange(weights.size) + 0.5) / 200 / STEPS
    mean = float(weights @ times)
    assert float(weights @ (times - mean) ** 2) ** 0.5 == pytest.approx(width, rel=1e-3)


@pytest.mark.parametrize("interval", [1, 4])
def test_the_recursion_gives_each_step_its_part_of_the_profile(interval: int) -> None:
    """The integral of p from a to b is (b^(g + 1) - a^(g + 1)) / t^(g + 1)."""
    power = exponent(0.1) + 1
    shares = np.zeros(0)
    for step in range(interval, 41, interval):
        factor = kept_share(0.1, step, interval)
        shares = np.append(shares * factor, 1 - factor)
    ends = np.arange(0, 41, interval) / 40
    np.testing.assert_allclose(shares, np.diff(ends**power), rtol=1e-9)


@pytest.mark.parametrize("wanted", [Profile(0.03, STEPS), Profile(0.15, STEPS), Profile(0.12, 230), Profile(0.25, 90)])
def test_the_error_is_that_of_the_profile(wanted: Profile) -> None:
    """Against sums over fine samples of the profiles themselves."""
    averages = kept(5)
    found = combine(averages, wanted)
    target = sampled(wanted, STEPS)
    made = sum(share * sampled(one, STEPS) for share, one in zip(found.shares, averages, strict=True))
    expected = np.linalg.norm(made - target) / np.linalg.norm(target)
    assert found.error == pytest.approx(float(expected), rel=1e-3)
    assert sum(found.shares) == pytest.approx(1, abs=1e-12)


def test_no_other_combination_is_nearer() -> None:
    """The last share is 1 less the others: least squares in the others, over fine samples of the profiles."""
    averages, wanted = kept(5), Profile(0.15, STEPS)
    found = combine(averages, wanted)
    profiles = np.stack([sampled(one, STEPS, 20) for one in averages])
    target = sampled(wanted, STEPS, 20)
    others, rest = profiles[:-1] - profiles[-1], target - profiles[-1]
    best = np.linalg.lstsq(others.T, rest, rcond=None)[0]
    least = np.linalg.norm(best @ others - rest) / np.linalg.norm(target)
    assert found.error == pytest.approx(float(least), rel=1e-3)


def test_a_kept_average_is_itself() -> None:
    averages = kept(8)
    for number in (3, len(averages) - 1):
        found = combine(averages, averages[number])
        assert found.error < 1e-6
        np.testing.assert_allclose(found.shares, np.eye(len(averages))[number], atol=1e-6)


def test_equal_snapshots_do_no_harm() -> None:
    """A run whose steps are left out saves the same average twice."""
    twice = combine([*kept(4), *kept(4)], Profile(0.15, STEPS))
    assert twice.error == pytest.approx(combine(kept(4), Profile(0.15, STEPS)).error, rel=1e-6)
