"""The measures on vectors whose cosines are known from school: 0°, 60°, 90°, 180°."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from library.evaluation import measures
from library.evaluation.bootstrap import interval

HALF = math.sqrt(3) / 2
EAST, NORTH, SIXTY = (1.0, 0.0), (0.0, 1.0), (0.5, HALF)  # 60 degrees from EAST, 30 from NORTH


def rows(*values: tuple[float, float]) -> torch.Tensor:
    return torch.tensor(values)


def test_fidelity_is_the_mean_over_the_real_images_whatever_the_lengths() -> None:
    generated, real = rows(EAST, SIXTY), rows((5.0, 0.0), (0.0, 0.1))
    assert measures.fidelity(generated, real).tolist() == pytest.approx([0.5, (0.5 + HALF) / 2])


def test_no_real_image_is_compared_with_itself() -> None:
    assert measures.real_baseline(rows(EAST, NORTH, SIXTY)) == pytest.approx((0 + 0.5 + HALF) / 3)
    assert measures.real_baseline(rows(EAST)) is None


def test_prompt_fidelity_pairs_each_image_with_its_own_text() -> None:
    images, texts = rows(EAST, EAST, EAST), rows(EAST, SIXTY, (-2.0, 0.0))
    assert measures.prompt_fidelity(images, texts).tolist() == pytest.approx([1, 0.5, -1])
    assert measures.clip_score(images, texts).tolist() == pytest.approx([100, 50, -100])


def test_diversity_is_over_pairs_of_different_images() -> None:
    assert measures.diversity(rows(EAST, EAST)) == pytest.approx(0)
    assert measures.diversity(rows(EAST, NORTH, SIXTY)) == pytest.approx((1 + 0.5 + 1 - HALF) / 3)
    assert measures.diversity(rows(EAST)) is None


def test_nearest_real_image() -> None:
    values, places = measures.nearest(rows(EAST, SIXTY), rows(NORTH, EAST))
    assert values == pytest.approx([1, HALF]) and places == [1, 0]


@pytest.mark.parametrize(
    ("real", "threshold"),
    [
        (rows(EAST), 0.95),
        (rows(EAST, NORTH), 0.9),  # very different images
        (rows(EAST, (math.cos(0.3), math.sin(0.3))), math.cos(0.3)),
        (rows(EAST, EAST, NORTH), 0.99),  # one image twice
    ],
)
def test_what_counts_as_a_copy(real: torch.Tensor, threshold: float) -> None:
    assert measures.copy_threshold(real) == pytest.approx(threshold)


def test_the_interval_is_that_of_scipy_up_to_the_draws() -> None:
    values = torch.rand(25, generator=torch.Generator().manual_seed(3)).tolist()
    low, high = interval(values) or (0, 0)
    wanted = scipy.stats.bootstrap((values,), lambda x, axis: x.mean(axis), method="percentile", n_resamples=20000,
                                   rng=1).confidence_interval  # fmt: skip
    width = wanted.high - wanted.low
    assert low == pytest.approx(wanted.low, abs=0.05 * width) and high == pytest.approx(wanted.high, abs=0.05 * width)
    assert interval(values) == (low, high)


def test_an_interval_moves_with_its_values_and_needs_two_prompts() -> None:
    """Two models are compared with the same draws."""
    low, high = interval([0.1, 0.4, 0.3]) or (0, 0)
    assert interval([1.1, 1.4, 1.3]) == pytest.approx((low + 1, high + 1))
    assert interval([0.1]) is None
