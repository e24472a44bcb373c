"""Options of the loss: noise, timesteps and loss weights."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.flag import flag


@dataclass(frozen=True)
class ObjectiveOptions:
    """Loss function, loss weights, noise and timesteps."""

    prior_loss_weight: float = flag(
        1.0, "Loss weight of regularisation images.", at_least=0, metadata="ss_prior_loss_weight"
    )
    min_snr_gamma: float | None = flag(
        None,
        "Min-SNR weighting: cap the loss weight of a timestep at gamma / SNR(t); 5 is usual, 0 = off.",
        at_least=0,
        zero_is_off=True,
        needs="snr",
        metadata="ss_min_snr_gamma",
    )
    noise_offset: float | None = flag(
        None,
        "Shift the noise of each channel by a random number times this value, so that very dark and very bright "
        "images can be learned; 0 = off.",
        at_least=0,
        zero_is_off=True,
        metadata="ss_noise_offset",
    )
    noise_offset_random_strength: bool = flag(
        False,
        "Draw the strength of noise_offset for each sample, from 0 to noise_offset.",
        metadata="ss_noise_offset_random_strength",
    )
    adaptive_noise_scale: float | None = flag(
        None,
        "Add this value times the absolute mean of each latent channel to noise_offset; 0 = off.",
        zero_is_off=True,
        metadata="ss_adaptive_noise_scale",
    )
    multires_noise_iterations: int | None = flag(
        None,
        "Pyramid noise: add coarser noise at this many scales; 6 to 10 is usual, 0 = off.",
        at_least=0,
        zero_is_off=True,
        metadata="ss_multires_noise_iterations",
    )
    multires_noise_discount: float = flag(
        0.3,
        "Strength of pyramid noise: each coarser scale is multiplied by this value to the power of the scale.",
        at_least=0,
        at_most=1,
        metadata="ss_multires_noise_discount",
    )
    multires_noise_scaling: str = flag(
        "sample",
        "Variance of pyramid noise: sample = calculated to be 1 for each sample, batch = divided by the standard "
        "deviation of the batch, as in sd-scripts.",
        choices=("sample", "batch"),
    )
    ip_noise_gamma: float | None = flag(
        None,
        "Input perturbation: add this much extra noise to the model's input but not to its target; 0.1 is usual, 0"
        " = off.",
        at_least=0,
        zero_is_off=True,
        metadata="ss_ip_noise_gamma",
    )
    ip_noise_gamma_random_strength: bool = flag(
        False,
        "Draw the strength of ip_noise_gamma for each sample, from 0 to ip_noise_gamma.",
        metadata="ss_ip_noise_gamma_random_strength",
    )
    loss_type: str = flag(
        "l2",
        "Loss function: l2 squared, l1 absolute, huber and smooth_l1 squared near 0 and absolute far from it.",
        choices=("l1", "l2", "huber", "smooth_l1"),
        metadata="ss_loss_type",
    )
    huber_schedule: str = flag(
        "snr",
        "How the threshold of huber and smooth_l1 depends on the timestep.",
        choices=("constant", "exponential", "snr"),
        metadata="ss_huber_schedule",
    )
    huber_c: float = flag(
        0.1, "Threshold of huber and smooth_l1 at the noisiest timestep.", above=0, metadata="ss_huber_c"
    )
    huber_scale: float = flag(
        1.0, "Factor for the threshold of huber and smooth_l1.", above=0, metadata="ss_huber_scale"
    )
    min_timestep: int | None = flag(None, "Lowest timestep to train; not set = 0.", at_least=0, at_most=999)
    max_timestep: int | None = flag(
        None, "Train only timesteps below this one; not set = 1000.", at_least=1, at_most=1000, zero_is_off=True
    )
    timestep_bias_strategy: str = flag(
        "none",
        "Draw some timesteps more often: earlier ones, later ones, or those of a range.",
        choices=("none", "earlier", "later", "range"),
    )
    timestep_bias_multiplier: float = flag(1.0, "Draw these timesteps this many times as often.", above=0)
    timestep_bias_portion: float = flag(
        0.25, "Share of the timesteps that counts as earlier or later.", above=0, at_most=1
    )
    timestep_bias_begin: int = flag(0, "First timestep of the range that is drawn more often.", at_least=0)
    timestep_bias_end: int = flag(1000, "End of the range that is drawn more often (exclusive).", at_least=1)
    debiased_estimation_loss: bool = flag(
        False,
        "Debiased estimation: weight the loss of a timestep by 1 / sqrt(SNR).",
        needs="snr",
        metadata="ss_debiased_estimation",
    )
    debiased_v_weight: str = flag(
        "equivalent",
        "Weight of debiased_estimation_loss with v-prediction: equivalent = sqrt(SNR) / (SNR + 1), the same "
        "objective as with noise prediction; amplification = 1 / sqrt(SNR + 1); kohya = 1 / (SNR + 1).",
        choices=("equivalent", "amplification", "kohya"),
        needs="snr",
    )
    scale_v_pred_loss_like_noise_pred: bool = flag(
        False, "With v-prediction: weight the loss to match noise prediction.", needs="snr"
    )
    v_pred_like_loss: float | None = flag(
        None,
        "With noise prediction: add this value times the loss that v-prediction would have; 0 = off.",
        at_least=0,
        zero_is_off=True,
        needs="snr",
    )
    zero_terminal_snr: bool = flag(
        False,
        "Rescale the noise schedule so that its last timestep is pure noise; for v-prediction.",
        needs="snr",
        metadata="ss_zero_terminal_snr",
        may_change_on_resume=True,
    )
    snr_floor: float = flag(
        0.0,
        "Minimum SNR in loss weights, so that zero_terminal_snr trains the last timestep too; 0 = off.",
        at_least=0,
        needs="snr",
    )
    refiner_training_strength: float = flag(
        0.2,
        "Share of the noise schedule that the refiner of Stable Diffusion XL trains, from the least noisy end: 0.2"
        " = timesteps 0 to 199.",
        above=0,
        below=1,
        needs="hand_over",
    )
    refiner_training_invert_schedule: bool = flag(
        False,
        "Train the other share of the noise schedule: a base model that hands over to a refiner.",
        needs="hand_over",
    )
