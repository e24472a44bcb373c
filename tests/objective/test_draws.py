"""Timesteps and noise: every sample from its own generator, whatever stands beside it and whatever is switched on."""

from __future__ import annotations

import pytest
import torch

from library.objective.objective import Draws, Objective
from library.objective.process import VariancePreserving
from library.objective.timesteps import draw_timesteps
from library.options.groups.objective import ObjectiveOptions

PROCESS = VariancePreserving.scaled_linear()
SAMPLE = (4, 8, 8)
LATENTS = 0.7 + torch.randn(9, *SAMPLE, generator=torch.Generator().manual_seed(3))

# options that change draws, each sample by itself
OFFSET = {"noise_offset": 0.1}
RANDOM_OFFSET = {**OFFSET, "noise_offset_random_strength": True}
ADAPTIVE = {**OFFSET, "adaptive_noise_scale": 0.2}
PYRAMID = {"multires_noise_iterations": 6}
INPUT = {"ip_noise_gamma": 0.1}
RANDOM_INPUT = {**INPUT, "ip_noise_gamma_random_strength": True}
BIAS = {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 3.0}
ALL = {**RANDOM_OFFSET, **ADAPTIVE, **PYRAMID, **RANDOM_INPUT, **BIAS}


def keyed(*indices: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 + index) for index in indices]


def draws_of(chosen: dict[str, object], *indices: int) -> Draws:
    rule: Objective[None] = Objective.from_options(ObjectiveOptions(**chosen), PROCESS, "v")  # type: ignore[arg-type]
    return rule.draw((len(indices), *SAMPLE), keyed(*indices), LATENTS[list(indices)])


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


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_draws_are_timestep_then_noise_then_a_shift_of_each_channel(offset: float) -> None:
    """By torch alone: a seed means the same timesteps and the same noise in every version of the program."""
    draws = draws_of({"noise_offset": offset} if offset else {}, 0, 1, 2)
    assert draws.perturbation is None
    for index, generator in enumerate(keyed(0, 1, 2)):
        assert draws.timesteps[index] == torch.randint(0, 1000, (), generator=generator)
        noise = torch.randn(SAMPLE, generator=generator)
        if offset:
            noise = noise + offset * torch.randn((4, 1, 1), generator=generator)
        assert torch.equal(draws.noise[index], noise)


def test_without_options_a_generator_is_left_where_it_always_was() -> None:
    """Some draw from it again afterwards."""
    rule: Objective[None] = Objective.from_options(ObjectiveOptions(min_snr_gamma=5.0), PROCESS, "v")
    (used,), (other,) = keyed(0), keyed(0)
    rule.draw((1, *SAMPLE), [used])
    torch.randint(0, 1000, (), generator=other)
    torch.randn(SAMPLE, generator=other)
    assert torch.equal(used.get_state(), other.get_state())


@pytest.mark.parametrize("chosen", [{}, OFFSET, PYRAMID, ADAPTIVE, RANDOM_INPUT, BIAS, ALL])
def test_a_sample_gets_the_same_draws_in_any_batch(chosen: dict[str, object]) -> None:
    together = draws_of(chosen, 0, 1, 2)
    for place in range(3):
        alone = draws_of(chosen, place)
        assert alone.timesteps[0] == together.timesteps[place]
        assert torch.equal(alone.noise[0], together.noise[place])
        if alone.perturbation is not None and together.perturbation is not None:
            assert torch.equal(alone.perturbation[0], together.perturbation[place])


@pytest.mark.parametrize("other", [OFFSET, RANDOM_OFFSET, ADAPTIVE, PYRAMID, BIAS, {"min_snr_gamma": 5.0}])
def test_no_option_changes_the_draws_of_another(other: dict[str, object]) -> None:
    plain, with_other = draws_of({}, 0, 1, 2), draws_of(other, 0, 1, 2)
    if other is not BIAS:
        assert torch.equal(with_other.timesteps, plain.timesteps)
    if other in (BIAS, {"min_snr_gamma": 5.0}):
        assert torch.equal(with_other.noise, plain.noise)
    # input noise beside the other leaves the other as it is, and is what it is alone
    for chosen in (INPUT, RANDOM_INPUT):
        alone, both = draws_of(chosen, 0, 1, 2), draws_of({**other, **chosen}, 0, 1, 2)
        assert torch.equal(alone.noise, plain.noise) and torch.equal(both.noise, with_other.noise)
        assert alone.perturbation is not None and both.perturbation is not None
        assert torch.equal(both.perturbation, alone.perturbation)
        assert torch.equal(both.timesteps, with_other.timesteps)


def test_offset_and_pyramid_keep_their_own_draws_together() -> None:
    plain, offset, pyramid, both = (draws_of(x, 0, 1).noise for x in ({}, OFFSET, PYRAMID, {**OFFSET, **PYRAMID}))
    torch.testing.assert_close(both - pyramid, offset - plain, atol=1e-6, rtol=0)


def test_other_samples_have_other_draws_for_every_purpose() -> None:
    draws = draws_of({**ALL, "adaptive_noise_scale": None}, *range(9))
    assert draws.perturbation is not None
    assert len({round(value.item(), 5) for value in draws.noise[:, 0, 0, 0]}) == 9
    assert len({round(value.item(), 5) for value in draws.perturbation[:, 0, 0, 0]}) == 9


def test_noise_is_standard_normal_float32() -> None:
    rule: Objective[None] = Objective(PROCESS, "epsilon", 0, 1000)
    noise = rule.draw((16, 4, 64, 64), keyed(*range(16))).noise
    assert noise.dtype == torch.float32 and noise.shape == (16, 4, 64, 64)
    assert noise.mean().abs() < 0.01
    assert noise.var().item() == pytest.approx(1.0, abs=0.01)
