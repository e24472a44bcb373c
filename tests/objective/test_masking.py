"""The mask of the loss: laws, and a plain reference in float64 written from the formulas."""

from __future__ import annotations

import pytest
import torch

from library.objective.loss import per_sample_loss
from library.objective.masking import MaskSettings
from library.objective.objective import Objective
from library.objective.process import VariancePreserving
from library.objective.weighting import Weighting
from library.options.groups.mask import MaskOptions

PROCESS = VariancePreserving.scaled_linear()
SHAPE = (5, 4, 8, 6)
ALL = [
    MaskSettings(),
    MaskSettings(floor=0.1),
    MaskSettings(invert=True),
    MaskSettings(normalise="sample"),
    MaskSettings(floor=0.05, invert=True, normalise="sample"),
]


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


def soft_mask(seed: int = 9) -> torch.Tensor:
    """Soft values, and samples with a large mask, a small one and none."""
    mask = torch.rand(SHAPE[0], 1, *SHAPE[2:], generator=torch.Generator().manual_seed(seed))
    mask[1] *= 0.02
    mask[2, :, 1:] = 0.0
    mask[3] = 0.0
    return mask


def reference(output: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, settings: MaskSettings) -> list[float]:
    """g * mean(m * (o - t)^2), m = clamp(m, floor, 1), g = min(1 / max(mean(m), 0.001), 4), in loops over floats."""
    losses = []
    for sample in range(SHAPE[0]):
        total = weight_sum = 0.0
        for y in range(SHAPE[2]):
            for x in range(SHAPE[3]):
                m = mask[sample, 0, y, x].item()
                m = min(max(1.0 - m if settings.invert else m, settings.floor), 1.0)
                weight_sum += m
                for c in range(SHAPE[1]):
                    total += m * (output[sample, c, y, x].item() - target[sample, c, y, x].item()) ** 2
        places = SHAPE[2] * SHAPE[3]
        gain = min(1.0 / max(weight_sum / places, 0.001), 4.0) if settings.normalise == "sample" else 1.0
        losses.append(gain * total / (places * SHAPE[1]))
    return losses


@pytest.mark.parametrize("settings", ALL)
def test_masked_losses_are_those_of_the_formula(settings: MaskSettings) -> None:
    output, target = pair()
    losses = per_sample_loss(output, target, soft_mask(), settings)
    assert losses.shape == (5,) and losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx(reference(output, target, soft_mask(), settings), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("settings", [s for s in ALL if not s.invert])
def test_a_mask_of_ones_changes_nothing(settings: MaskSettings) -> None:
    output, target = pair()
    masked, plain = output.clone().requires_grad_(), output.clone().requires_grad_()
    losses = per_sample_loss(masked, target, torch.ones(5, 1, 8, 6), settings)
    assert torch.equal(losses, per_sample_loss(plain, target))
    losses.sum().backward()
    per_sample_loss(plain, target).sum().backward()
    assert torch.equal(masked.grad, plain.grad)


@pytest.mark.parametrize("normalise", ["none", "sample"])
def test_a_mask_of_zeros_gives_no_loss_and_no_gradient(normalise) -> None:
    output, target = pair()
    output.requires_grad_()
    losses = per_sample_loss(output, target, torch.zeros(5, 1, 8, 6), MaskSettings(normalise=normalise))
    losses.sum().backward()
    assert losses.tolist() == [0.0] * 5
    assert output.grad.abs().max() == 0.0


def test_masked_positions_have_no_gradient() -> None:
    output, target = pair()
    mask = (soft_mask() > 0.5).float()
    masked, plain = output.clone().requires_grad_(), output.clone().requires_grad_()
    per_sample_loss(masked, target, mask).sum().backward()
    per_sample_loss(plain, target).sum().backward()
    assert torch.equal(masked.grad, plain.grad * mask)


@pytest.mark.parametrize("settings", ALL)
def test_a_missing_mask_counts_fully_whatever_the_settings(settings: MaskSettings) -> None:
    output, target = pair()
    mask = torch.full((5, 1, 8, 6), settings.missing)
    assert torch.equal(per_sample_loss(output, target, mask, settings), per_sample_loss(output, target))


def test_an_inverted_mask_is_the_mask_of_the_rest() -> None:
    output, target = pair()
    mask = (soft_mask() > 0.5).float()
    inverted = per_sample_loss(output, target, mask, MaskSettings(invert=True))
    assert torch.equal(inverted, per_sample_loss(output, target, 1.0 - mask))


def test_the_gain_makes_up_for_the_size_of_a_mask_up_to_four_times() -> None:
    """8 x 8 of 64 x 64 places: the mean is 1/64. With a floor of 0.1 it is 0.1140625."""
    errors = torch.ones(1, 4, 64, 64)
    mask = torch.zeros(1, 1, 64, 64)
    mask[:, :, :8, :8] = 1.0

    def loss(mask: torch.Tensor, **chosen) -> float:
        return per_sample_loss(errors, torch.zeros_like(errors), mask, MaskSettings(**chosen)).item()

    assert loss(mask) == 0.015625
    assert loss(mask, normalise="sample") == 0.0625  # 4 and not 64 times
    assert loss(mask, floor=0.1) == pytest.approx(0.1140625, rel=1e-6)
    assert loss(mask, floor=0.1, normalise="sample") == pytest.approx(4 * 0.1140625, rel=1e-6)
    half = torch.zeros(1, 1, 64, 64)
    half[:, :, :32] = 1.0
    assert loss(half, normalise="sample") == 1.0  # a mean of 0.5 is doubled


def test_a_sample_does_not_feel_the_masks_of_its_batch() -> None:
    output, target = pair()
    mask, settings = soft_mask(), MaskSettings(normalise="sample")
    together = per_sample_loss(output, target, mask, settings)
    for i in range(5):
        alone = per_sample_loss(output[i : i + 1], target[i : i + 1], mask[i : i + 1], settings)
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_masks_go_with_min_snr(prediction) -> None:
    """The weight by timestep is a factor of the masked loss."""
    settings = MaskSettings(floor=0.1, normalise="sample")
    rule = Objective(PROCESS, prediction, 0, 1000, weightings=(Weighting("min_snr", 5.0),), mask=settings)
    latents, _ = pair(3)
    draws = rule.draw(SHAPE, [torch.Generator().manual_seed(seed) for seed in range(5)])
    losses = rule.loss(lambda noisy, t, extra: 0.3 * noisy, latents, None, draws, soft_mask())

    output = 0.3 * PROCESS.add_noise(latents, draws.noise, draws.timesteps)
    target = PROCESS.target(latents, draws.noise, draws.timesteps, prediction)
    plain = reference(output, target, soft_mask(), settings)
    expected = []
    for t, value in zip(draws.timesteps.tolist(), plain, strict=True):
        snr = PROCESS.alphas_cumprod[t] / (1.0 - PROCESS.alphas_cumprod[t])
        expected.append(value * min(snr, 5.0) / (snr if prediction == "epsilon" else snr + 1.0))
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)


def test_a_batch_without_masks_has_the_loss_of_white_ones() -> None:
    rule = Objective(PROCESS, "epsilon", 0, 1000, mask=MaskSettings(normalise="sample"))
    latents, _ = pair(4)
    draws = rule.draw(SHAPE, [torch.Generator().manual_seed(seed) for seed in range(5)])
    without = rule.loss(lambda noisy, t, extra: 0.3 * noisy, latents, None, draws)
    assert torch.equal(without, rule.loss(lambda n, t, extra: 0.3 * n, latents, None, draws, torch.ones(5, 1, 8, 6)))


def test_masks_that_would_broadcast_are_refused() -> None:
    output, target = pair()
    for shape in ((1, 1, 8, 6), (5, 8, 6), (5, 4, 8, 6), (5, 1, 1, 1)):
        with pytest.raises(ValueError, match="mask"):
            per_sample_loss(output, target, torch.ones(shape))


def test_the_settings_of_the_options() -> None:
    assert MaskSettings.from_options(MaskOptions()) == MaskSettings()
    options = MaskOptions(mask_floor=0.2, mask_invert=True, mask_normalise="sample")
    assert MaskSettings.from_options(options) == MaskSettings(0.2, True, "sample")
