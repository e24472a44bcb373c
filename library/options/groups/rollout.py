"""Options of scheduled sampling: samples that begin where the model's own sampler arrives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from library.options.flag import flag

RampShape = Literal["linear", "cosine"]
Strategy = Literal["uniform", "biased_early", "biased_late"]
RolloutSampler = Literal["unipc", "dpm", "euler"]
RolloutTarget = Literal["corrected", "original"]
Stride = Literal["training", "inference"]


@dataclass(frozen=True)
class RolloutOptions:
    """Which samples are rolled, over how many steps of which sampler, and what the model has to answer then."""

    scheduled_sampling_max_step_offset: int = flag(
        0,
        "Rollout: let the model itself denoise a sample in up to this many steps, and train on what it arrives at; "
        "0 = off. The length of a step is scheduled_sampling_stride.",
        at_least=0,
        at_most=999,
        needs="rollout",
    )
    scheduled_sampling_probability: float = flag(0.0, "Share of the samples that are rolled.", at_least=0, at_most=1)
    scheduled_sampling_ramp_steps: int = flag(
        0,
        "Raise the share from scheduled_sampling_prob_start to its end over this many steps; 0 = at once.",
        at_least=0,
    )
    scheduled_sampling_start_step: int = flag(0, "Roll no sample in the first so many steps.", at_least=0)
    scheduled_sampling_ramp_shape: RampShape = flag("linear", "How the share rises.", choices=get_args(RampShape))
    scheduled_sampling_prob_start: float = flag(
        0.0, "Share of the samples that are rolled at the beginning of the ramp.", at_least=0, at_most=1
    )
    scheduled_sampling_prob_end: float | None = flag(
        None, "The share at the end of the ramp; not set = scheduled_sampling_probability.", at_least=0, at_most=1
    )
    scheduled_sampling_strategy: Strategy = flag(
        "uniform",
        "Steps of a rolled sample: all numbers equally often, few more often (biased_early), or many (biased_late).",
        choices=get_args(Strategy),
    )
    scheduled_sampling_sampler: RolloutSampler = flag(
        "unipc",
        "Sampler of a rollout: unipc and dpm (DPM-Solver++) use the step before too, euler (DDIM) does not. The first "
        "step is the same.",
        choices=get_args(RolloutSampler),
    )
    scheduled_sampling_target: RolloutTarget = flag(
        "corrected",
        "Target of a rolled sample: corrected = the answer that leads from where it is to its image; original = that "
        "for the noise it was made with, as in SimpleTuner.",
        choices=get_args(RolloutTarget),
    )
    scheduled_sampling_stride: Stride = flag(
        "training",
        "Length of a step of a rollout: training = one timestep; inference = one step of drawing an image in "
        "scheduled_sampling_inference_steps steps, of which 1 to 3 are enough.",
        choices=get_args(Stride),
    )
    scheduled_sampling_inference_steps: int = flag(
        28, "Steps in which images are drawn, for scheduled_sampling_stride inference.", at_least=10, at_most=1000
    )
