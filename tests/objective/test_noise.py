"""Shaped noise against its formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from library.objective.noise import NoiseShaping, draw_white
from library.objective.objective import Draws, Objective
from library.objective.process import VariancePreserving
from library.objective.pyramid import Pyramid
from library.options.groups.objective import ObjectiveOptions

PROCESS = VariancePreserving.scaled_linear()


def keyed(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(70 + index) for index in range(count)]


def draw(shaping: NoiseShaping, shape: tuple[int, ...] = (2, 4, 16, 16), latents: torch.Tensor | None = None) -> Draws:
    rule: Objective[None] = Objective(PROCESS, "epsilon", 0, 1000, noise=shaping)
    return rule.draw(shape, keyed(shape[0]), latents)


def test_the_offset_shifts_whole_channels_of_the_same_noise() -> None:
    shift = draw(NoiseShaping(offset=0.1)).noise - draw(NoiseShaping()).noise
    assert shift.std(dim=(2, 3)).max() < 1e-6
    assert shift[:, :, 0, 0].unique().numel() == 8


def test_the_offset_widens_a_channels_mean_as_published() -> None:
    """Variance of the mean of 64 x 64 values: 1/4096 + offset**2."""
    means = draw(NoiseShaping(offset=0.1), (64, 64, 64, 64)).noise.mean(dim=(2, 3))
    assert means.std().item() == pytest.approx((1 / 4096 + 0.01) ** 0.5, rel=0.05)


def test_a_random_strength_is_one_for_each_sample_and_uniform_up_to_the_offset() -> None:
    shape = (400, 4, 2, 2)
    plain = draw(NoiseShaping(), shape).noise
    fixed = (draw(NoiseShaping(offset=1.0), shape).noise - plain)[:, :, 0, 0]
    varied = (draw(NoiseShaping(offset=1.0, offset_random_strength=True), shape).noise - plain)[:, :, 0, 0]
    strengths = (varied.double() * fixed).sum(1) / fixed.double().square().sum(1)
    torch.testing.assert_close(strengths[:, None] * fixed.double(), varied.double(), atol=1e-6, rtol=0)
    assert 0.0 <= strengths.min() < 0.02 and 0.98 < strengths.max() < 1.0
    # deviation of the mean of 400 uniform numbers: 0.0144
    assert strengths.mean().item() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("scale", [0.5, -0.5])
@pytest.mark.parametrize("random_strength", [False, True])
def test_the_adaptive_scale_by_its_formula(scale: float, random_strength: bool) -> None:
    """o = max(0, [u] offset + scale |mean of x0|) for each channel of each sample."""
    latents = torch.randn(2, 4, 16, 16) + torch.tensor([-2.0, -0.1, 0.1, 2.0]).view(1, 4, 1, 1)
    plain = draw(NoiseShaping()).noise.numpy().astype(np.float64)
    unit = draw(NoiseShaping(offset=1.0)).noise.numpy() - plain
    base = np.full((2, 4, 1, 1), 0.3)
    if random_strength:
        base = 0.3 * (draw(NoiseShaping(offset=1.0, offset_random_strength=True)).noise.numpy() - plain) / unit
    means = np.abs(latents.numpy().astype(np.float64).mean(axis=(2, 3), keepdims=True))
    expected = plain + np.maximum(0.0, base + scale * means) * unit
    shaping = NoiseShaping(offset=0.3, offset_random_strength=random_strength, adaptive_scale=scale)
    noise = draw(shaping, latents=latents).noise
    np.testing.assert_allclose(noise.numpy(), expected, atol=3e-5)
    if scale < 0:  # channels whose mean is about 2 have no offset left
        np.testing.assert_allclose(noise[:, [0, 3]].numpy(), plain[:, [0, 3]], atol=1e-6)


def test_an_adaptive_scale_needs_the_latents() -> None:
    with pytest.raises(ValueError, match="latents"):
        draw(NoiseShaping(offset=0.1, adaptive_scale=0.1))


def test_the_network_gets_perturbed_noise_and_answers_the_unperturbed() -> None:
    """x_t = a x0 + s (n + g xi), target n, or v of n."""
    latents = torch.randn(2, 4, 16, 16)
    for prediction in ("epsilon", "v"):
        rule: Objective[None] = Objective(PROCESS, prediction, 0, 1000, noise=NoiseShaping(perturbation=0.1))  # type: ignore[arg-type]
        draws = rule.draw(latents.shape, keyed(2))
        assert draws.perturbation is not None
        assert torch.equal(draws.noise, draw_of_nothing())
        table = np.array(PROCESS.alphas_cumprod)[draws.timesteps.numpy()].reshape(2, 1, 1, 1)
        a, s, x0 = np.sqrt(table), np.sqrt(1 - table), latents.numpy().astype(np.float64)
        n, xi = draws.noise.numpy().astype(np.float64), draws.perturbation.numpy().astype(np.float64)
        seen = []

        def predict(noisy: torch.Tensor, t: torch.Tensor, extra: None, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(noisy)
            return torch.zeros_like(noisy)

        losses = rule.loss(predict, latents, None, draws)
        np.testing.assert_allclose(seen[0].numpy(), a * x0 + s * (n + xi), atol=2e-6)
        target = n if prediction == "epsilon" else a * n - s * x0
        np.testing.assert_allclose(losses.numpy(), (target**2).mean(axis=(1, 2, 3)), rtol=1e-5)


def draw_of_nothing() -> torch.Tensor:
    return draw(NoiseShaping()).noise


def test_the_perturbation_has_its_strength_and_none_of_the_noise() -> None:
    draws = draw(NoiseShaping(perturbation=0.1), (16, 4, 32, 32))
    assert draws.perturbation is not None and draws.perturbation.dtype == torch.float32
    assert draws.perturbation.std().item() == pytest.approx(0.1, rel=0.01)
    # 65536 independent pairs: deviation 0.004
    assert (draws.perturbation * draws.noise).mean().abs() < 0.002
    fixed, shape = draws.perturbation, (16, 4, 32, 32)
    varied = draw(NoiseShaping(perturbation=0.1, perturbation_random_strength=True), shape).perturbation
    assert varied is not None
    strengths = varied[:, 0, 0, 0] / fixed[:, 0, 0, 0]
    torch.testing.assert_close(strengths.view(-1, 1, 1, 1) * fixed, varied, atol=1e-6, rtol=1e-4)
    assert strengths.min() > 0 and strengths.max() < 1 and strengths.std() > 0.15


def test_the_shaping_of_the_options() -> None:
    assert NoiseShaping.from_options(ObjectiveOptions()) == NoiseShaping()
    zeros = ObjectiveOptions(noise_offset=0.0, ip_noise_gamma=0.0, multires_noise_iterations=0)
    assert NoiseShaping.from_options(zeros) == NoiseShaping()
    options = ObjectiveOptions(
        noise_offset=0.1,
        noise_offset_random_strength=True,
        adaptive_noise_scale=0.2,
        multires_noise_iterations=6,
        multires_noise_discount=0.4,
        multires_noise_scaling="batch",
        ip_noise_gamma=0.05,
        ip_noise_gamma_random_strength=True,
    )
    expected = NoiseShaping(0.1, True, 0.2, Pyramid(6, 0.4, "batch"), 0.05, True)
    assert NoiseShaping.from_options(options) == expected


def test_without_an_offset_there_is_nothing_to_adapt_or_to_vary() -> None:
    idle = NoiseShaping(adaptive_scale=0.1, offset_random_strength=True, perturbation_random_strength=True)
    draws = draw(idle)
    assert torch.equal(draws.noise, draw(NoiseShaping()).noise) and draws.perturbation is None


def test_white_noise_is_the_generators_own() -> None:
    one, two = draw_white((3, 5), keyed(2))
    assert torch.equal(one, torch.randn(3, 5, generator=keyed(2)[0])) and not torch.equal(one, two)
