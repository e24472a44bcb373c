"""Timesteps and noise: every sample from its own generator, whatever stands beside it."""

from __future__ import annotations

import pytest
import torch

from library.objective.noise import draw_noise
from library.objective.timesteps import draw_timesteps


def keyed(*indices: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 + index) for index in indices]


def test_timesteps_are_uniform_in_the_half_open_range() -> None:
    steps = draw_timesteps(keyed(*range(4000)), 5, 15)
    assert steps.dtype == torch.int64 and steps.shape == (4000,)
    counts = torch.bincount(steps, minlength=15)
    assert counts[:5].sum() == 0 and counts[5:].sum() == 4000
    # 400 expected in each of the ten, standard deviation 19
    assert counts[5:].min() > 310 and counts[5:].max() < 490


def test_a_range_of_one_gives_that_timestep() -> None:
    assert draw_timesteps(keyed(1, 2, 3), 999, 1000).tolist() == [999, 999, 999]


@pytest.mark.parametrize(("low", "high"), [(5, 5), (7, 3), (-1, 10)])
def test_an_impossible_range_is_refused(low: int, high: int) -> None:
    with pytest.raises(ValueError, match=f"{low}, {high}"):
        draw_timesteps(keyed(1), low, high)


def test_a_sample_gets_the_same_draws_in_any_batch() -> None:
    def draws(*indices: int) -> list[tuple[int, torch.Tensor]]:
        generators = keyed(*indices)
        steps = draw_timesteps(generators, 0, 1000)
        noise = draw_noise((4, 8, 8), generators, offset=0.1)
        return list(zip(steps.tolist(), noise, strict=True))

    together = draws(0, 1, 2)
    apart = [draws(2)[0], draws(0)[0], draws(1)[0]]
    for (step, noise), (other_step, other_noise) in zip(together, [apart[1], apart[2], apart[0]], strict=True):
        assert step == other_step
        assert torch.equal(noise, other_noise)


def test_noise_is_standard_normal_float32() -> None:
    noise = draw_noise((4, 64, 64), keyed(*range(16)))
    assert noise.dtype == torch.float32 and noise.shape == (16, 4, 64, 64)
    assert noise.mean().abs() < 0.01
    assert noise.var().item() == pytest.approx(1.0, abs=0.01)


def test_the_offset_shifts_whole_channels_of_the_same_noise() -> None:
    plain = draw_noise((4, 16, 16), keyed(7, 8))
    shift = draw_noise((4, 16, 16), keyed(7, 8), offset=0.1) - plain
    assert shift.std(dim=(2, 3)).max() < 1e-6
    assert shift[:, :, 0, 0].unique().numel() == 8


def test_the_offset_widens_a_channels_mean_as_published() -> None:
    """Variance of the mean of 64 x 64 values: 1/4096 + offset**2."""
    means = draw_noise((64, 64, 64), keyed(*range(64)), offset=0.1).mean(dim=(2, 3))
    assert means.std().item() == pytest.approx((1 / 4096 + 0.01) ** 0.5, rel=0.05)
