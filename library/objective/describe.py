"""The options of loss and noise in words, for the plan of a run: no torch here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.options.groups.objective import ObjectiveOptions


def describe(options: ObjectiveOptions, prediction: str) -> tuple[str, ...]:
    """Each thing that differs from the plain loss, in a few words: error, weight, noise, timesteps.

    `prediction` is "epsilon" or "v"; the weight of regularisation images is not among them.
    """
    return (*_error(options), *_weight(options, prediction), *_noise(options), *_timesteps(options))


def _error(options: ObjectiveOptions) -> Iterator[str]:
    if options.loss_type in ("huber", "smooth_l1"):
        scale = f" times {options.huber_scale:g}" if options.huber_scale != 1.0 else ""
        yield f"{options.loss_type} with {options.huber_schedule} threshold {options.huber_c:g}{scale}"
    elif options.loss_type != "l2":
        yield f"{options.loss_type} errors"


def _weight(options: ObjectiveOptions, prediction: str) -> Iterator[str]:
    weight = ""
    if options.min_snr_gamma:
        weight = f"min-SNR weight with gamma {options.min_snr_gamma:g}"
    elif options.debiased_estimation_loss:
        weight = "debiased weight" + (f" ({options.debiased_v_weight})" if prediction == "v" else "")
    elif options.scale_v_pred_loss_like_noise_pred:
        weight = "weighted as noise prediction"
    elif options.v_pred_like_loss:
        weight = f"plus {options.v_pred_like_loss:g} times the loss of v-prediction"
    if weight:
        yield weight + (f", SNR counted as {options.snr_floor:g} at least" if options.snr_floor else "")
    if options.zero_terminal_snr:
        yield "zero terminal SNR"


def _noise(options: ObjectiveOptions) -> Iterator[str]:
    if options.noise_offset:
        up_to = "up to " if options.noise_offset_random_strength else ""
        scale = options.adaptive_noise_scale
        adaptive = f" and {scale:g} times the mean of the latents" if scale else ""
        yield f"noise offset {up_to}{options.noise_offset:g}{adaptive}"
    if options.multires_noise_iterations:
        by_batch = ", scaled by the batch" if options.multires_noise_scaling == "batch" else ""
        levels, discount = options.multires_noise_iterations, options.multires_noise_discount
        yield f"pyramid noise of up to {levels} scales, discount {discount:g}{by_batch}"
    if options.ip_noise_gamma:
        up_to = "up to " if options.ip_noise_gamma_random_strength else ""
        yield f"input noise {up_to}{options.ip_noise_gamma:g}"


def _timesteps(options: ObjectiveOptions) -> Iterator[str]:
    low, high = options.min_timestep, options.max_timestep
    if low or high:
        bounds = [f"from {low}"] if low else []
        bounds += [f"below {high}"] if high else []
        yield f"timesteps {' and '.join(bounds)}"
    strategy, multiplier = options.timestep_bias_strategy, options.timestep_bias_multiplier
    if strategy != "none":
        which = f"{options.timestep_bias_portion:g} of the timesteps, the {strategy} ones,"
        if strategy == "range":
            which = f"timesteps from {options.timestep_bias_begin} and below {options.timestep_bias_end}"
        yield f"{which} {multiplier:g} times as often"
