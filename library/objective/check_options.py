"""Check the loss and noise options against the model, before anything is loaded. No torch.

Rules between flags alone are in library.options.rules.objective. The checks here depend on the prediction type, on the
number of timesteps, or compare the values of several flags.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

from library.messages import counted
from library.options.mistakes import Mistake
from library.options.rules.objective import WEIGHTINGS

if TYPE_CHECKING:
    from library.objective.rollout import RolloutSettings
    from library.options.groups.objective import ObjectiveOptions


def check(
    options: ObjectiveOptions, prediction: str, timesteps: int = 1000, *, has_snr: bool = True
) -> tuple[tuple[Mistake, ...], tuple[str, ...]]:
    """Mistakes and notes for a model that predicts "epsilon" or "v" at timesteps 0 .. `timesteps` - 1.

    `has_snr`: whether its process has an SNR. Flags that need one (`needs="snr"`) are rejected elsewhere.
    """
    mistakes = (
        *_check_prediction(options, prediction),
        *_check_timesteps(options, timesteps),
        *_check_huber(options, has_snr=has_snr),
    )
    notes = (*_note_no_effect(options, prediction), *_note_surprises(options, prediction, timesteps))
    return mistakes, notes


def check_rollout(
    rollout: RolloutSettings | None, options: ObjectiveOptions, timesteps: int = 1000
) -> tuple[tuple[Mistake, ...], tuple[str, ...]]:
    """Mistakes and notes for a rollout, with the other options of the loss."""
    if rollout is None:
        return (), ()
    low, high = _timestep_range(options, timesteps)
    mistakes, notes = [], []
    if low < high <= low + rollout.stride:
        what = f"a step of a rollout is {counted(rollout.stride, 'timestep')}, but only {low} to {high - 1} are trained"
        mistakes.append(Mistake(what, "use more --scheduled_sampling_inference_steps, or do not roll samples"))
    if rollout.stride > 1 and rollout.longest > 3:
        notes.append(
            f"--scheduled_sampling_max_step_offset {rollout.longest} counts steps of {rollout.stride} timesteps with "
            "--scheduled_sampling_stride inference: 1 to 3 are enough"
        )
    if options.ip_noise_gamma:
        notes.append("--ip_noise_gamma: rolled samples have no input perturbation, as they are off their path already")
    return tuple(mistakes), tuple(notes)


def _check_prediction(options: ObjectiveOptions, prediction: str) -> Iterator[Mistake]:
    if prediction != "v" and options.scale_v_pred_loss_like_noise_pred:
        yield Mistake(
            "--scale_v_pred_loss_like_noise_pred has no effect: the model already predicts noise",
            "remove it, or add --v_parameterization if the model predicts v",
        )
    if prediction != "v" and options.zero_terminal_snr:
        yield Mistake(
            "--zero_terminal_snr needs a model that predicts v: at the last timestep the input is pure noise, from "
            "which a model that predicts noise learns nothing about the image",
            "remove it, or add --v_parameterization if the model predicts v",
        )
    if prediction == "v" and options.v_pred_like_loss:
        yield Mistake(
            f"--v_pred_like_loss = {options.v_pred_like_loss:g} has no effect: the model already predicts v",
            "remove it",
        )


def _check_timesteps(options: ObjectiveOptions, timesteps: int) -> Iterator[Mistake]:
    low, high = _timestep_range(options, timesteps)
    if high > timesteps:
        yield Mistake(
            f"--max_timestep = {high}: the model has {timesteps} timesteps", f"use a value of at most {timesteps}"
        )
    if low >= high:
        yield Mistake(
            f"--min_timestep = {low} with --max_timestep = {high}: no timestep is at least {low} and below {high}",
            f"to train only timestep {low} set --max_timestep {low + 1}",
        )
    elif options.timestep_bias_strategy == "range":
        begin, end = options.timestep_bias_begin, options.timestep_bias_end
        flags = f"--timestep_bias_begin = {begin} with --timestep_bias_end = {end}"
        if begin >= end:
            yield Mistake(f"{flags}: the range is empty", "use a --timestep_bias_begin below --timestep_bias_end")
        elif end > timesteps:
            yield Mistake(
                f"{flags}: the model has {timesteps} timesteps", f"use a --timestep_bias_end of at most {timesteps}"
            )
        elif begin >= high or end <= low:
            yield Mistake(
                f"{flags}: outside of the trained timesteps {low} to {high - 1}",
                "choose a range that overlaps with --min_timestep and --max_timestep",
            )
    elif options.timestep_bias_strategy != "none" and int(options.timestep_bias_portion * (high - low)) == 0:
        yield Mistake(
            f"--timestep_bias_portion = {options.timestep_bias_portion:g}: less than one of {high - low} timesteps",
            "use a larger value",
        )


def _check_huber(options: ObjectiveOptions, *, has_snr: bool) -> Iterator[Mistake]:
    is_huber = options.loss_type in ("huber", "smooth_l1")
    if is_huber and options.huber_schedule == "snr" and not has_snr:
        yield Mistake(
            f"--loss_type {options.loss_type} with --huber_schedule snr: the model's noise schedule has no SNR",
            "use --huber_schedule exponential or constant",
        )
    scheduled = is_huber and options.huber_schedule != "constant"
    if scheduled and options.huber_c > 1.0:
        yield Mistake(
            f"--huber_c = {options.huber_c:g} with --huber_schedule {options.huber_schedule}: the threshold decreases "
            "from 1 to this value",
            "use a value of at most 1, or --huber_schedule constant; --huber_scale raises all thresholds",
        )


def _note_no_effect(options: ObjectiveOptions, prediction: str) -> Iterator[str]:
    """Flags that are set without effect. The rules between flags report those that are off by default."""
    defaults = {field.name: field.default for field in fields(options)}
    for names, why in _unused_flags(options, prediction):
        for name in names:
            if getattr(options, name) != defaults[name]:
                yield f"--{name} = {getattr(options, name)}: no effect, {why}"


def _unused_flags(options: ObjectiveOptions, prediction: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Flags that the other options leave without effect, and why."""
    if options.loss_type not in ("huber", "smooth_l1"):
        yield ("huber_schedule", "huber_c", "huber_scale"), f"--loss_type is {options.loss_type}"
    if not options.multires_noise_iterations:
        names = ("multires_noise_discount", "multires_noise_scaling")
        yield names, "pyramid noise is off (--multires_noise_iterations is not set)"
    strategy = options.timestep_bias_strategy
    if strategy == "none":
        yield ("timestep_bias_multiplier",), f"--timestep_bias_strategy is {strategy}"
    if strategy in ("none", "range"):
        yield ("timestep_bias_portion",), f"--timestep_bias_strategy is {strategy}"
    if strategy != "range":
        yield ("timestep_bias_begin", "timestep_bias_end"), f"--timestep_bias_strategy is {strategy}"
    if not options.debiased_estimation_loss:
        yield ("debiased_v_weight",), "--debiased_estimation_loss is not set"
    elif prediction != "v":
        yield ("debiased_v_weight",), "the model predicts noise"


def _note_surprises(options: ObjectiveOptions, prediction: str, timesteps: int) -> Iterator[str]:
    strategy = options.timestep_bias_strategy
    if strategy != "none" and options.timestep_bias_multiplier == 1.0:
        yield f"--timestep_bias_strategy {strategy}: no effect, --timestep_bias_multiplier is 1"
    elif strategy != "none" and _biases_all(options, timesteps):
        yield f"--timestep_bias_strategy {strategy}: no effect, it covers all trained timesteps"
    if options.noise_offset and options.multires_noise_iterations:
        yield (
            "--noise_offset with --multires_noise_iterations: both shift whole channels of the noise and add up; one "
            "of them is usually enough"
        )
    if options.multires_noise_iterations and options.multires_noise_discount == 0.0:
        yield "--multires_noise_discount = 0: pyramid noise has no effect"
    if options.multires_noise_iterations and options.multires_noise_scaling == "batch":
        yield "--multires_noise_scaling batch: the noise of a sample depends on the other samples of its batch"
    weightings = [name for name in WEIGHTINGS if getattr(options, name)]
    if len(weightings) > 1:
        yield (f"--{' with --'.join(weightings)}: their weights multiply, as in sd-scripts; usually one of them is set")
    if weightings and options.loss_type in ("huber", "smooth_l1"):
        yield (
            f"--loss_type {options.loss_type} with --{weightings[0]}: the weighting is derived for the squared error; "
            "large errors at noisy timesteps are reduced twice"
        )
    if options.debiased_v_weight != "equivalent":  # this weight is not 0 without signal
        weightings = [name for name in weightings if name != "debiased_estimation_loss"]
    if prediction == "v" and options.zero_terminal_snr and weightings and not options.snr_floor:
        yield (
            f"--zero_terminal_snr with --{weightings[0]}: the last timestep has weight 0 and is not trained; set "
            "--snr_floor 0.05 to train it"
        )
    if prediction == "epsilon" and options.v_pred_like_loss:
        yield (
            f"--v_pred_like_loss = {options.v_pred_like_loss:g}: noisy timesteps are weighted up to "
            f"{1.0 + 214.6 * options.v_pred_like_loss:.0f} times as much with the usual schedule"
        )


def _biases_all(options: ObjectiveOptions, timesteps: int) -> bool:
    low, high = _timestep_range(options, timesteps)
    if options.timestep_bias_strategy == "range":
        return options.timestep_bias_begin <= low and high <= options.timestep_bias_end
    return options.timestep_bias_portion == 1.0


def _timestep_range(options: ObjectiveOptions, timesteps: int) -> tuple[int, int]:
    """The trained timesteps: [low, high)."""
    return options.min_timestep or 0, options.max_timestep or timesteps
