"""Samplers by kohya's names: which of diffusers' schedulers each is, with what arguments. No torch at module level."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from library.options.mistakes import Mistake, UserError

if TYPE_CHECKING:
    from library.objective.process import ForwardProcess, Prediction


@dataclass(frozen=True)
class Sampler:
    """A class of diffusers and its arguments beside the forward process; `package`: what it needs installed.

    `zero_snr`: its arguments for a model trained with zero terminal SNR, as far as the class can. `corrected`: it takes
    its first step twice, and asks for a prediction at the second timestep in between.
    """

    scheduler: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    package: str | None = None
    zero_snr: Mapping[str, Any] = field(default_factory=dict)
    corrected: bool = False


# As in the scheduler of the published models: latents are not clipped, the last step goes to the process's own start.
_LATENT = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
# Lin et al. 2023 (arXiv 2305.08891): sampling begins at the last timestep, and that is noise alone.
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
    "k_lms": _LMS,
    "k_euler": _EULER,
    "k_euler_a": _EULER_A,
    "k_dpm_2": _DPM_2,
    "k_dpm_2_a": _DPM_2_A,
}

_PREDICTIONS: Mapping[Prediction, str] = {"epsilon": "epsilon", "v": "v_prediction"}


def check_sampler(name: str) -> Mistake | None:
    """What is wrong with a sampler's name on this machine, or None."""
    sampler = SAMPLERS.get(name)
    if sampler is None:
        return Mistake(f'there is no sampler "{name}"', f"use one of {', '.join(SAMPLERS)}")
    if sampler.package is not None and importlib.util.find_spec(sampler.package) is None:
        return Mistake(f'the sampler "{name}" needs the package {sampler.package}', f"pip install {sampler.package}")
    return None


def make_scheduler(name: str, process: ForwardProcess, prediction: Prediction, zero_terminal_snr: bool = False) -> Any:
    """A fresh scheduler of diffusers over a family's process. UserError for a wrong name.

    `zero_terminal_snr`: over the process rescaled to end in noise alone, for v-prediction (from an output that means
    noise nothing follows there), and as far as the sampler can.
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


def begin_below(name: str, scheduler: Any, end: float) -> Any:
    """The timesteps (steps,) that are left of the sampler `name` when it begins at its first timestep below `end`, as
    for an image that is refined; the scheduler is told so. UserError if none lies there."""
    timesteps = scheduler.timesteps
    # a step of second order takes two places, the first of which it begins at
    start = next((place for place in range(0, len(timesteps), scheduler.order) if timesteps[place] < end), None)
    if start is None:
        what = f'the sampler "{name}" with so few steps takes none below timestep {end:g}, where refining begins'
        raise UserError(
            [Mistake(what, f"give more steps: {int(scheduler.config.num_train_timesteps / end) + 1} or more")]
        )
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    if not SAMPLERS[name].corrected:
        return timesteps[start:]
    left = timesteps[start:].unique_consecutive()
    # diffusers lists the second timestep twice only at the very beginning, and would be a step late from any other
    return left[[0, *([1] if len(left) > 1 else []), *range(1, len(left))]]
