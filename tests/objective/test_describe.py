"""The plan's description of the loss."""

from __future__ import annotations

from library.objective.describe import describe
from library.options.groups.objective import ObjectiveOptions


def described(prediction: str = "epsilon", **chosen) -> tuple[str, ...]:
    return describe(ObjectiveOptions(**chosen), prediction)


def test_the_plain_loss_is_not_described() -> None:
    assert described() == described("v", max_timestep=None, min_timestep=0) == ()


def test_every_option_is_described_with_its_numbers() -> None:
    product = described(min_snr_gamma=5.0, debiased_estimation_loss=True)
    assert product == ("min-SNR weighting with gamma 5 times debiased weighting",)
    assert described(min_snr_gamma=5.0, snr_floor=0.05) == ("min-SNR weighting with gamma 5, SNR at least 0.05",)
    assert described("v", debiased_estimation_loss=True) == ("debiased weighting (equivalent)",)
    assert described(debiased_estimation_loss=True) == ("debiased weighting",)
    assert described("v", scale_v_pred_loss_like_noise_pred=True, zero_terminal_snr=True) == (
        "weighted like noise prediction",
        "zero terminal SNR",
    )
    assert described(v_pred_like_loss=0.5) == ("plus 0.5 times the v-prediction loss",)
    assert described(loss_type="l1") == ("l1 loss",)
    assert described(loss_type="huber", huber_scale=2.0) == ("huber loss with snr threshold 0.1 times 2",)
    assert described(noise_offset=0.1) == ("noise offset 0.1",)
    assert described(noise_offset=0.1, noise_offset_random_strength=True, adaptive_noise_scale=-0.2) == (
        "noise offset up to 0.1 plus -0.2 times the mean of the latents",
    )
    assert described(multires_noise_iterations=6, multires_noise_scaling="batch", ip_noise_gamma=0.1) == (
        "pyramid noise with up to 6 levels, discount 0.3, normalised by batch",
        "input perturbation noise 0.1",
    )
    assert described(min_timestep=10, max_timestep=900) == ("timesteps from 10 and below 900",)
    assert described(max_timestep=900, timestep_bias_strategy="later", timestep_bias_multiplier=3.0) == (
        "timesteps below 900",
        "the later 25% of the timesteps drawn 3 times as often",
    )
    assert described(timestep_bias_strategy="range", timestep_bias_multiplier=2.0, timestep_bias_end=300) == (
        "timesteps from 0 and below 300 drawn 2 times as often",
    )
