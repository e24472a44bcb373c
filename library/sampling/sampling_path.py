"""The way of a batch of images through a sampler: where it begins, its steps, and where another model takes over.

Image-to-image starts from a noised image (Meng et al. 2021, arXiv 2108.01073). A base model may hand over to a refiner
(Podell et al. 2023, arXiv 2307.01952, section 2.5).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from library.families.family import Model
from library.objective.process import VariancePreserving
from library.sampling.prompts import ImageRequest
from library.sampling.samplers import first_below, make_scheduler, start_below, with_prediction

Progress = Callable[[int], object]
"""Called after each step with the number of images that took it; see count_steps."""


@dataclass(frozen=True)
class SamplingPath:
    """Where a batch begins, and the steps from there: latents (B, C, h, w) float32, scaled as the backbone sees them,
    the timesteps to run, and a random generator for each image."""

    scheduler: Any
    timesteps: Tensor
    latents: Tensor
    generators: list[torch.Generator]


@dataclass(frozen=True)
class Unfinished:
    """An image on its way: `latents` (C, h, w) float32 as the sampler has them before its first step below the timestep
    `below`; `scheduler`: one that has taken no step, with the same path; `random`: the state of its generator there."""

    latents: Tensor
    below: int
    scheduler: Any
    random: Tensor


@dataclass
class HandOver:
    """Keeps the images of sample_batch on their way, on the CPU and by their place among the requests, where another
    model is to go on: at the first step below the timestep `below`. An image with no step there is not kept."""

    below: int
    kept: dict[int, Unfinished] = field(default_factory=dict)

    def watch(self, places: Sequence[int], path: SamplingPath) -> Callable[[int, Tensor], None]:
        """A function that is told (number of steps done, latents) before each step of these images."""
        begins = first_below(path.scheduler, self.below)
        unused = type(path.scheduler).from_config(path.scheduler.config)

        def keep(done: int, latents: Tensor) -> None:
            for row, place in enumerate(places if done == begins else ()):
                random = path.generators[row].get_state()
                self.kept[place] = Unfinished(latents[row].cpu().clone(), self.below, unused, random)

        return keep


@dataclass(frozen=True)
class Estimate:
    """What a model takes an image for on its way: the clean image that it predicted in the step `done` (from 1) of
    `steps`, at `timestep`. `latents` (1, C, h, w) float32, scaled; `row`: place of the image among the requests."""

    row: int
    done: int
    steps: int
    timestep: float
    latents: Tensor


@dataclass(frozen=True)
class Estimates:
    """Tells of the clean images that a model predicts in every `every`-th step but the last, whose result is the image
    itself."""

    every: int
    tell: Callable[[Estimate], None]

    def watch(self, model: Model, places: Sequence[int], path: SamplingPath) -> Predicted:
        """A function that is told of each step of these images. Nothing that it does changes them."""
        process, steps = model.family.process, len(path.timesteps)
        if path.scheduler.config.get("rescale_betas_zero_snr") and isinstance(process, VariancePreserving):
            process = process.zero_terminal()

        def estimate(done: int, seen: Tensor, timestep: Tensor, output: Tensor) -> None:
            if done % self.every or done == steps:
                return
            # samplers may go through timesteps in between: the nearest one has the same noise but for a hundredth
            t = timestep.reshape(1).round().long().expand(len(seen))
            clean = process.to_x0(seen.float(), output, t, model.prediction)
            for place, latents in zip(places, torch.split(clean, 1), strict=True):
                self.tell(Estimate(place, done, steps, float(timestep), latents))

        return estimate


Predicted = Callable[[int, Tensor, Tensor, Tensor], None]
"""(number of steps done, noisy latents (B, C, h, w) as the model saw them, timestep, the model's output)."""


def set_timesteps(model: Model, scheduler: Any, request: ImageRequest, strength: float | None) -> Tensor:
    """Set the steps of the scheduler and return the timesteps (steps,) to run; `strength` None: all."""
    scheduler.set_timesteps(request.steps, device=model.backbone.device)
    timesteps: Tensor = scheduler.timesteps
    if strength is not None:
        timesteps = start_below(request.sampler, scheduler, round(strength * model.family.process.timesteps))
    return timesteps


def begin(
    model: Model, request: ImageRequest, seeds: Sequence[int], init_latents: Tensor | None, strength: float
) -> SamplingPath:
    """Begin at noise, or at noised `init_latents`."""
    device, space = model.backbone.device, model.family.latent
    scheduler = make_scheduler(
        request.sampler, model.family.process, model.prediction, zero_terminal_snr=model.zero_terminal_snr
    )
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    timesteps = set_timesteps(model, scheduler, request, None if init_latents is None else strength)
    shape = (1, space.channels, request.height // space.stride, request.width // space.stride)
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    if init_latents is None:
        return SamplingPath(scheduler, timesteps, noise * scheduler.init_noise_sigma, generators)
    noised = scheduler.add_noise(space.scaled(init_latents.to(noise)), noise, timesteps[:1])
    return SamplingPath(scheduler, timesteps, noised, generators)


def go_on(model: Model, request: ImageRequest, unfinished: Sequence[Unfinished]) -> SamplingPath:
    """Go on where another model handed over, with its schedule and this model's prediction type, as in the ensemble of
    SDXL and its refiner   (arXiv 2307.01952, section 2.5; diffusers' denoising_end and denoising_start)."""
    device, first = model.backbone.device, unfinished[0]
    scheduler = with_prediction(first.scheduler, model.prediction)
    scheduler.set_timesteps(request.steps, device=device)
    timesteps = start_below(request.sampler, scheduler, first.below)
    latents = torch.stack([each.latents for each in unfinished]).to(device)
    generators = [torch.Generator("cpu").set_state(each.random) for each in unfinished]
    return SamplingPath(scheduler, timesteps, latents, generators)


def follow(
    path: SamplingPath,
    predict: Callable[[Tensor, Tensor], Tensor],
    progress: Progress | None,
    watch: Callable[[int, Tensor], None] | None,
    predicted: Predicted | None = None,
) -> Tensor:
    """Run the sampler; returns the latents (B, C, h, w). `watch`: see HandOver.watch. `predicted` is called after each
    step."""
    scheduler, latents = path.scheduler, path.latents
    parameters = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"generator": path.generators} if "generator" in parameters else {}
    for done, timestep in enumerate(path.timesteps):
        if watch is not None:
            watch(done, latents)
        if "order" in parameters:  # diffusers assumes earlier steps even when it starts in the middle
            extra["order"] = min(done + 1, parameters["order"].default)
        seen = scheduler.scale_model_input(latents, timestep)
        output = predict(seen, timestep)
        latents = scheduler.step(output, timestep, latents, **extra, return_dict=False)[0]
        if predicted is not None:
            predicted(done + 1, seen, timestep, output)
        if progress is not None:
            progress(len(latents))
    return latents
