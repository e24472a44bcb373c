"""Samplers by kohya's names: which of diffusers' schedulers each is, with what arguments. No torch at module level."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from library.options.mistakes import Mistake, UserError

if TYPE_CHECKING:
    from library.objective.process import Prediction


@dataclass(frozen=True)
class Sampler:
    """A class of diffusers and its arguments beside the forward process; `package`: what it needs installed."""

    scheduler: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    package: str | None = None


# As in the scheduler of the published models: latents are not clipped, the last step goes to the process's own start.
_LATENT = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
_LMS = Sampler("LMSDiscreteScheduler", package="scipy")
_EULER = Sampler("EulerDiscreteScheduler")
_EULER_A = Sampler("EulerAncestralDiscreteScheduler")
_DPM_2 = Sampler("KDPM2DiscreteScheduler")
_DPM_2_A = Sampler("KDPM2AncestralDiscreteScheduler")

SAMPLERS: Mapping[str, Sampler] = {
    "ddim": Sampler("DDIMScheduler", _LATENT),
    "pndm": Sampler("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    "lms": _LMS,
    "euler": _EULER,
    "euler_a": _EULER_A,
    "heun": Sampler("HeunDiscreteScheduler"),
    "dpm_2": _DPM_2,
    "dpm_2_a": _DPM_2_A,
    "dpmsolver": Sampler(
        "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    ),
    "dpmsolver++": Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
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


def make_scheduler(name: str, prediction: Prediction) -> Any:
    """A fresh scheduler of diffusers over Stable Diffusion's scaled-linear process. UserError for a wrong name."""
    mistake = check_sampler(name)
    if mistake is not None:
        raise UserError([mistake])
    import diffusers

    sampler = SAMPLERS[name]
    return getattr(diffusers, sampler.scheduler)(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=_PREDICTIONS[prediction],
        **sampler.arguments,
    )
