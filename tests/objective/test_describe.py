"""The loss in words: whatever was chosen can be read."""

from __future__ import annotations

from library.objective.describe import describe
from library.options.groups.objective import ObjectiveOptions


def words(prediction: str = "epsilon", **chosen) -> tuple[str, ...]:
    return describe(ObjectiveOptions(**chosen), prediction)


def test_the_plain_loss_needs_no_words() -> None:
    assert words() == words("v", max_timestep=None, min_timestep=0) == ()


def test_each_choice_is_named_with_its_numbers() -> None:
    assert words(min_snr_gamma=5.0, snr_floor=0.05) == ("min-SNR weight with gamma 5, SNR counted as 0.05 at least",)
    assert words("v", debiased_estimation_loss=True) == ("debiased weight (equivalent)",)
    assert words(debiased_estimation_loss=True) == ("debiased weight",)
    assert words("v", scale_v_pred_loss_like_noise_pred=True, zero_terminal_snr=True) == (
        "weighted as noise prediction",
        "zero terminal SNR",
    )
    assert words(v_pred_like_loss=0.5) == ("plus 0.5 times the loss of v-prediction",)
    assert words(loss_type="l1") == ("l1 errors",)
    assert words(loss_type="huber", huber_scale=2.0) == ("huber with snr threshold 0.1 times 2",)
    assert words(noise_offset=0.1) == ("noise offset 0.1",)
    assert words(noise_offset=0.1, noise_offset_random_strength=True, adaptive_noise_scale=-0.2) == (
        "noise offset up to 0.1 and -0.2 times the mean of the latents",
    )
    assert words(multires_noise_iterations=6, multires_noise_scaling="batch", ip_noise_gamma=0.1) == (
        "pyramid noise of up to 6 scales, discount 0.3, scaled by the batch",
        "input noise 0.1",
    )
    assert words(min_timestep=10, max_timestep=900) == ("timesteps from 10 and below 900",)
    assert words(max_timestep=900, timestep_bias_strategy="later", timestep_bias_multiplier=3.0) == (
        "timesteps below 900",
        "0.25 of the timesteps, the later ones, 3 times as often",
    )
    assert words(timestep_bias_strategy="range", timestep_bias_multiplier=2.0, timestep_bias_end=300) == (
        "timesteps from 0 and below 300 2 times as often",
    )
