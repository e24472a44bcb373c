"""Pyramid noise: its variance by calculation, against a plain reference, and sd-scripts' way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from library.objective.pyramid import Pyramid, deviations


def keyed(count: int, start: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(300 + start + index) for index in range(count)]


def white(count: int, *sample: int, start: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9000 + start)
    return torch.randn(count, *sample, generator=generator)


def linear(short: int, long: int) -> np.ndarray:
    """Linear interpolation of `short` values to `long`, sample points in the middle of their cells, ends kept."""
    matrix = np.zeros((long, short))
    for row in range(long):
        place = min(max((row + 0.5) * short / long - 0.5, 0.0), short - 1.0)
        left = math.floor(place)
        right = min(left + 1, short - 1)
        matrix[row, left] += 1.0 - (place - left)
        matrix[row, right] += place - left
    return matrix


@pytest.mark.parametrize(("levels", "discount"), [(1, 0.3), (2, 0.8), (10, 0.5)])
def test_by_its_formula(levels: int, discount: float) -> None:
    """(n + sum of d^i u_i) / sqrt(1 + sum of d^(2i)), u_i divided by its own deviation at each place."""
    noise = white(2, 3, 24, 17)
    shaped = Pyramid(levels, discount).add(noise, keyed(2))
    for index, generator in enumerate(keyed(2)):
        total, variance = noise[index].numpy().astype(np.float64), 1.0
        tall, wide = 24.0, 17.0
        for level in range(1, levels + 1):
            shrink = 2.0 + 2.0 * torch.rand((), generator=generator).item()
            tall, wide = tall / shrink, wide / shrink
            rows, columns = max(1, int(tall)), max(1, int(wide))
            small = torch.randn((3, rows, columns), generator=generator).numpy().astype(np.float64)
            down, across = linear(rows, 24), linear(columns, 17)
            deviation = np.sqrt((down**2).sum(1)[:, None] * (across**2).sum(1)[None, :])
            total += discount**level * (down @ small @ across.T) / deviation
            variance += discount ** (2 * level)
            if rows == 1 or columns == 1:
                break
        np.testing.assert_allclose(shaped[index].numpy(), total / math.sqrt(variance), atol=2e-6)


def test_interpolation_makes_variance_smaller_by_what_is_known() -> None:
    """In the middle between two values 1/2, on a value 1; on average of two dimensions, twice as large: 0.40."""
    for short, long in ((1, 5), (3, 8), (21, 64), (7, 7)):
        np.testing.assert_allclose(
            deviations(short, long).numpy(), np.sqrt((linear(short, long) ** 2).sum(1)), rtol=1e-6
        )
    variance = deviations(32, 64).double().square()
    assert (variance[:, None] * variance).mean().item() == pytest.approx(0.40, abs=0.01)


@pytest.mark.parametrize("discount", [0.3, 0.8])
def test_every_value_of_a_sample_has_variance_1(discount: float) -> None:
    """1500 samples: the variance at one place has a deviation of 0.037, the mean over all places a smaller one."""
    shaped = torch.cat([Pyramid(6, discount).add(white(1500, 1, 12, 9), keyed(1500))])
    by_place = shaped.double().square().mean(dim=(0, 1))
    assert by_place.min() > 0.8 and by_place.max() < 1.2
    assert by_place.mean().item() == pytest.approx(1.0, abs=0.05)
    assert shaped.mean().abs() < 0.05


def test_it_has_more_of_low_frequencies() -> None:
    means = Pyramid(8, 0.8).add(white(100, 4, 32, 32), keyed(100)).mean(dim=(2, 3))
    assert means.var() > 20 / 1024  # of white noise: 1/1024


def test_a_sample_is_the_same_in_any_batch_only_with_the_scaling_by_sample() -> None:
    noise = white(3, 4, 16, 16)
    for scaling, alike in (("sample", True), ("batch", False)):
        pyramid = Pyramid(6, 0.5, scaling)  # type: ignore[arg-type]
        together, alone = pyramid.add(noise, keyed(3)), pyramid.add(noise[:1], keyed(1))
        assert torch.equal(together[0], alone[0]) is alike


def test_a_further_level_keeps_the_coarser_noise_of_the_others() -> None:
    """What a level adds has the rank of its size: at most 32 for the first one of 64, 16, 8."""
    noise = white(1, 1, 64, 64)
    raw = [noise]
    for levels in (1, 2, 3):
        raw.append(Pyramid(levels, 0.5).add(noise, keyed(1)) * math.sqrt(sum(0.25**i for i in range(levels + 1))))
    added = [(after - before)[0, 0] for before, after in zip(raw, raw[1:], strict=False)]
    ranks = [int(torch.linalg.matrix_rank(level, rtol=1e-4)) for level in added]
    assert 16 <= ranks[0] <= 32 and 4 <= ranks[1] <= 16 and 1 <= ranks[2] <= 8
    assert ranks == sorted(ranks, reverse=True)


def test_the_noise_is_not_modified_in_place() -> None:
    for scaling in ("sample", "batch"):
        noise = white(2, 4, 16, 16)
        before = noise.clone()
        Pyramid(4, 0.5, scaling).add(noise, keyed(2))  # type: ignore[arg-type]
        assert torch.equal(noise, before)


def test_the_way_of_sd_scripts_divides_by_the_deviation_of_the_batch() -> None:
    shaped = Pyramid(6, 0.8, "batch").add(white(4, 4, 32, 32), keyed(4))
    assert shaped.std().item() == pytest.approx(1.0, abs=1e-5)


def test_the_way_of_sd_scripts_has_its_published_strength() -> None:
    """The variance of a channel's mean over 64 x 64 values in batches of 4: 0.0848 for a discount of 0.8."""
    pyramid = Pyramid(10, 0.8, "batch")
    means = [
        pyramid.add(white(4, 4, 64, 64, start=k), keyed(4, start=10 * k)).mean(dim=(2, 3)).flatten() for k in range(60)
    ]
    assert torch.cat(means).var().item() == pytest.approx(0.0848, rel=0.3)


@pytest.mark.parametrize("scaling", ["sample", "batch"])
def test_small_and_long_latents_end_the_pyramid(scaling) -> None:
    for shape in ((1, 1), (2, 40), (64, 3)):
        noise = white(2, 4, *shape)
        assert Pyramid(10, 0.9, scaling).add(noise, keyed(2)).isfinite().all()
