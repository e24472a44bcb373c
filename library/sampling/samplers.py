"""Samplers by their names in sd-scripts, as diffusers' schedulers with arguments. No torch at module level."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from library.messages import pip_install
from library.options.mistakes import Mistake, UserError

if TYPE_CHECKING:
    from library.objective.process import ForwardProcess, Prediction


@dataclass(frozen=True)
class Sampler:
    """A scheduler class of diffusers and its arguments besides the forward process.

    `package`: a package it needs. `zero_snr`: arguments for models trained with zero terminal SNR, as far as the class
    supports it. `corrected`: the first step runs twice, with a prediction at the second timestep in between.
    """

    scheduler: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    package: str | None = None
    zero_snr: Mapping[str, Any] = field(default_factory=dict)
    corrected: bool = False


# As in the published models' schedulers: no clipping of latents, the last step ends at the process's first timestep.
_LATENT = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
# Lin et al. 2023 (arXiv 2305.08891): sampling starts at the last timestep, which is pure noise.
_TRAILING = {"timestep_spacing": "trailing"}
_ZERO_SNR = {**_TRAILING, "rescale_betas_zero_snr": True}
_LMS = Sampler("LMSDiscreteScheduler", package="scipy", zero_snr=_TRAILING)
_EULER = Sampler("EulerDiscreteScheduler", zero_snr=_ZERO_SNR)
_EULER_A = Sampler("EulerAncestralDiscreteScheduler", zero_snr=_ZERO_SNR)
_DPM_2 = Sampler("KDPM2DiscreteScheduler", zero_snr=_TRAILING)
_DPM_2_A = Sampler("KDPM2AncestralDiscreteScheduler", zero_snr=_TRAILING)

SAMPLERS: Mapping[str, Sampler] = {
    "ddim": Sampler("DDIMScheduler", _LATENT, zero_snr=_ZERO_SNR),
    "pndm": Sampler(
        "PNDMScheduler",
        {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1},
        zero_snr=_TRAILING,
        corrected=True,
    ),
    "lms": _LMS,
    "euler": _EULER,
    "euler_a": _EULER_A,
    "heun": Sampler("HeunDiscreteScheduler", zero_snr=_TRAILING),
    "dpm_2": _DPM_2,
    "dpm_2_a": _DPM_2_A,
    "dpmsolver": Sampler(
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        zero_snr=_ZERO_SNR,
    ),
    "dpmsolver++": Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}, zero_snr=_ZERO_SNR),
    "dpmsingle": Sampler("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++"}),
    "unipc": Sampler("UniPCMultistepScheduler", zero_snr=_ZERO_SNR),
    "k_lms": _LMS,
    "k_euler": _EULER,
    "k_euler_a": _EULER_A,
    "k_dpm_2": _DPM_2,
    "k_dpm_2_a": _DPM_2_A,
}

_PREDICTIONS: Mapping[Prediction, str] = {"epsilon": "epsilon", "v": "v_prediction"}


def check_sampler(name: str) -> Mistake | None:
    """Return a mistake if the sampler is unknown or its package is missing, otherwise None."""
    sampler = SAMPLERS.get(name)
    if sampler is None:
        return Mistake(f'unknown sampler "{name}"', f"use one of {', '.join(SAMPLERS)}")
    if sampler.package is not None and importlib.util.find_spec(sampler.package) is None:
        return Mistake(f'the sampler "{name}" needs the package {sampler.package}', pip_install(sampler.package))
    return None


def make_scheduler(
    name: str, process: ForwardProcess, prediction: Prediction, *, zero_terminal_snr: bool = False
) -> Any:
    """Make a diffusers scheduler for a family's forward process. Raises UserError for an unknown name.

    `zero_terminal_snr`: rescale the process to end in pure noise, as far as the sampler supports it; only with
    v-prediction, as a noise prediction carries no information there.
    """
    mistake = check_sampler(name)
    if mistake is not None:
        raise UserError([mistake])
    import diffusers

    sampler = SAMPLERS[name]
    return getattr(diffusers, sampler.scheduler)(
        **process.scheduler_arguments(),
        prediction_type=_PREDICTIONS[prediction],
        **sampler.arguments,
        **(sampler.zero_snr if zero_terminal_snr and prediction == "v" else {}),
    )


def with_prediction(scheduler: Any, prediction: Prediction) -> Any:
    """A scheduler with the same path for a model with this prediction type."""
    return type(scheduler).from_config(scheduler.config, prediction_type=_PREDICTIONS[prediction])


def first_below(scheduler: Any, end: float) -> int | None:
    """The place in the timesteps of a scheduler at which its first step below `end` begins; None if there is none."""
    timesteps = scheduler.timesteps
    # a second-order step has two timesteps in the list and starts at the first
    return next((place for place in range(0, len(timesteps), scheduler.order) if timesteps[place] < end), None)


def start_below(name: str, scheduler: Any, end: float) -> Any:
    """Start the sampler `name` at its first timestep below `end`, where another model hands over or image-to-image
    begins, and return its remaining timesteps (steps,). Raises UserError if there are none."""
    timesteps, start = scheduler.timesteps, first_below(scheduler, end)
    if start is None:
        what = f'the sampler "{name}" has too few steps: none below timestep {end:g}, where refining starts'
        raise UserError([Mistake(what, f"use {int(scheduler.config.num_train_timesteps / end) + 1} or more steps")])
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    if not SAMPLERS[name].corrected:
        return timesteps[start:]
    remaining = timesteps[start:].unique_consecutive()
    # diffusers repeats the second timestep only at the very beginning, and would lag one step from any other start
    return remaining[[0, *([1] if len(remaining) > 1 else []), *range(1, len(remaining))]]


def set_path(scheduler: Any, timesteps: Sequence[int]) -> Any:
    """Make a multistep scheduler ("dpmsolver++", "unipc") go through these timesteps, descending, and return it. They
    end with the one at which it arrives.

    diffusers sets other paths than those of a whole image for some schedulers only, and none that end at noise.
    """
    import torch

    scheduler.set_timesteps(len(timesteps))
    scheduler.timesteps = torch.tensor(timesteps)
    products = scheduler.alphas_cumprod[scheduler.timesteps]
    scheduler.sigmas = torch.cat([((1 - products) / products).sqrt(), torch.zeros(1)])
    scheduler.set_begin_index(0)
    return scheduler
