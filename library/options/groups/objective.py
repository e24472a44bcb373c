"""What the loss is."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.flag import flag


@dataclass(frozen=True)
class ObjectiveOptions:
    """The loss and the noise."""

    prior_loss_weight: float = flag(
        1.0, "Weight of the loss of regularisation images.", at_least=0, metadata="ss_prior_loss_weight"
    )
    min_snr_gamma: float | None = flag(
        None,
        "Cap the weight of a timestep at gamma / SNR(t), which evens out easy and hard timesteps; 5 is usual, 0 = off.",
        at_least=0,
        zero_is_off=True,
        needs="snr",
        metadata="ss_min_snr_gamma",
    )
    noise_offset: float | None = flag(
        None,
        "Shift the noise of each channel by this times a random number, so that very dark and very bright "
        "images can be learned; 0 = off.",
        at_least=0,
        zero_is_off=True,
        metadata="ss_noise_offset",
    )
    noise_offset_random_strength: bool = flag(
        False,
        "Draw the strength of noise_offset anew for each sample, from 0 to noise_offset.",
        metadata="ss_noise_offset_random_strength",
    )
    adaptive_noise_scale: float | None = flag(
        None,
        "Add this times the absolute mean of each channel of the latents to noise_offset.",
        zero_is_off=True,
        metadata="ss_adaptive_noise_scale",
    )
    multires_noise_iterations: int | None = flag(
        None,
        "Add coarser noise at this many scales (pyramid noise); 6 to 10 is usual, 0 = off.",
        at_least=0,
        zero_is_off=True,
        metadata="ss_multires_noise_iterations",
    )
    multires_noise_discount: float = flag(
        0.3,
        "How much of each coarser scale of pyramid noise is added: this to the power of the scale.",
        at_least=0,
        at_most=1,
        metadata="ss_multires_noise_discount",
    )
    multires_noise_scaling: str = flag(
        "sample",
        "Variance of pyramid noise: sample = 1 for each sample by calculation, batch = as sd-scripts, which divides by "
        "the deviation of the batch.",
        choices=("sample", "batch"),
    )
    ip_noise_gamma: float | None = flag(
        None,
        "Add this much further noise to the network's input but not to its target (input perturbation); 0.1 is usual, "
        "0 = off.",
        at_least=0,
        zero_is_off=True,
        metadata="ss_ip_noise_gamma",
    )
    ip_noise_gamma_random_strength: bool = flag(
        False,
        "Draw the strength of ip_noise_gamma anew for each sample, from 0 to ip_noise_gamma.",
        metadata="ss_ip_noise_gamma_random_strength",
    )
    loss_type: str = flag(
        "l2",
        "Error of each value: l2 squared, l1 absolute, huber and smooth_l1 squared near 0 and absolute far from it.",
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
        0.1, "Threshold of huber and smooth_l1 where the noise is strongest.", above=0, metadata="ss_huber_c"
    )
    huber_scale: float = flag(
        1.0, "Factor of the threshold of huber and smooth_l1.", above=0, metadata="ss_huber_scale"
    )
    min_timestep: int | None = flag(None, "Least timestep that is trained at; not set = 0.", at_least=0, at_most=999)
    max_timestep: int | None = flag(
        None, "Timesteps below this one are trained at; not set = 1000.", at_least=1, at_most=1000, zero_is_off=True
    )
    timestep_bias_strategy: str = flag(
        "none",
        "Draw some timesteps more often: earlier, later, or those of a range.",
        choices=("none", "earlier", "later", "range"),
    )
    timestep_bias_multiplier: float = flag(1.0, "How many times as often these timesteps are drawn.", above=0)
    timestep_bias_portion: float = flag(
        0.25, "Which share of the timesteps counts as earlier or later.", above=0, at_most=1
    )
    timestep_bias_begin: int = flag(0, "First timestep of the range that is drawn more often.", at_least=0)
    timestep_bias_end: int = flag(1000, "End of the range that is drawn more often, itself not in it.", at_least=1)
    debiased_estimation_loss: bool = flag(
        False,
        "Weight each timestep by 1 / sqrt(SNR), so that errors count by how they enter the image.",
        needs="snr",
        metadata="ss_debiased_estimation",
    )
    debiased_v_weight: str = flag(
        "equivalent",
        "Weight of debiased_estimation_loss for v-prediction: equivalent = the same objective as for noise, "
        "sqrt(SNR) / (SNR + 1); amplification = 1 / sqrt(SNR + 1); kohya = 1 / (SNR + 1).",
        choices=("equivalent", "amplification", "kohya"),
        needs="snr",
    )
    scale_v_pred_loss_like_noise_pred: bool = flag(
        False, "Weight the loss of v-prediction so that it is that of noise prediction.", needs="snr"
    )
    v_pred_like_loss: float | None = flag(
        None,
        "Add this times the loss that v-prediction would have to that of noise prediction; 0 = off.",
        at_least=0,
        zero_is_off=True,
        needs="snr",
    )
    zero_terminal_snr: bool = flag(
        False,
        "Rescale the noise schedule so that its last timestep is noise alone; for v-prediction.",
        needs="snr",
        metadata="ss_zero_terminal_snr",
        may_change_on_resume=True,
    )
    snr_floor: float = flag(
        0.0,
        "Let no weight by timestep be smaller than that of this SNR, so that with zero_terminal_snr the last timestep "
        "is trained too.",
        at_least=0,
        needs="snr",
    )
    refiner_training_strength: float = flag(
        0.2,
        "Share of the noise schedule that belongs to the refiner of Stable Diffusion XL, from its least noisy end: "
        "0.2 = timesteps 0 to 199.",
        above=0,
        below=1,
        needs="hand_over",
    )
    refiner_training_invert_schedule: bool = flag(
        False,
        "Train the other share of the noise schedule: a base model that leaves the rest to a refiner.",
        needs="hand_over",
    )
