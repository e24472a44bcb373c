"""Describe the loss and noise options in the plan of a run. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.options.groups.objective import ObjectiveOptions


def describe(options: ObjectiveOptions, prediction: str) -> tuple[str, ...]:
    """What differs from the plain loss: error, timestep weight, noise, timesteps. One short text each.

    `prediction` is "epsilon" or "v". The weight of regularisation images is described elsewhere.
    """
    return (*_error(options), *_weight(options, prediction), *_noise(options), *_timesteps(options))


def _error(options: ObjectiveOptions) -> Iterator[str]:
    if options.loss_type in ("huber", "smooth_l1"):
        scale = f" times {options.huber_scale:g}" if options.huber_scale != 1.0 else ""
        yield f"{options.loss_type} loss with {options.huber_schedule} threshold {options.huber_c:g}{scale}"
    elif options.loss_type != "l2":
        yield f"{options.loss_type} loss"


def _weight(options: ObjectiveOptions, prediction: str) -> Iterator[str]:
    weights = []
    if options.min_snr_gamma:
        weights.append(f"min-SNR weighting with gamma {options.min_snr_gamma:g}")
    if options.debiased_estimation_loss:
        weights.append("debiased weighting" + (f" ({options.debiased_v_weight})" if prediction == "v" else ""))
    if options.scale_v_pred_loss_like_noise_pred:
        weights.append("weighted like noise prediction")
    if options.v_pred_like_loss:
        weights.append(f"plus {options.v_pred_like_loss:g} times the v-prediction loss")
    if weights:
        yield " times ".join(weights) + (f", SNR at least {options.snr_floor:g}" if options.snr_floor else "")
    if options.zero_terminal_snr:
        yield "zero terminal SNR"


def _noise(options: ObjectiveOptions) -> Iterator[str]:
    if options.noise_offset:
        up_to = "up to " if options.noise_offset_random_strength else ""
        scale = options.adaptive_noise_scale
        adaptive = f" plus {scale:g} times the mean of the latents" if scale else ""
        yield f"noise offset {up_to}{options.noise_offset:g}{adaptive}"
    if options.multires_noise_iterations:
        by_batch = ", normalised by batch" if options.multires_noise_scaling == "batch" else ""
        levels, discount = options.multires_noise_iterations, options.multires_noise_discount
        yield f"pyramid noise with up to {levels} levels, discount {discount:g}{by_batch}"
    if options.ip_noise_gamma:
        up_to = "up to " if options.ip_noise_gamma_random_strength else ""
        yield f"input perturbation noise {up_to}{options.ip_noise_gamma:g}"


def _timesteps(options: ObjectiveOptions) -> Iterator[str]:
    low, high = options.min_timestep, options.max_timestep
    if low or high:
        bounds = [f"from {low}"] if low else []
        bounds += [f"below {high}"] if high else []
        yield f"timesteps {' and '.join(bounds)}"
    strategy, multiplier = options.timestep_bias_strategy, options.timestep_bias_multiplier
    if strategy != "none":
        which = f"the {strategy} {100 * options.timestep_bias_portion:g}% of the timesteps"
        if strategy == "range":
            which = f"timesteps from {options.timestep_bias_begin} and below {options.timestep_bias_end}"
        yield f"{which} drawn {multiplier:g} times as often"
