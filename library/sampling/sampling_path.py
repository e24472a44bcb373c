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
) -> Tensor:
    """Run the sampler; returns the latents (B, C, h, w). `watch`: see HandOver.watch."""
    scheduler, latents = path.scheduler, path.latents
    parameters = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"generator": path.generators} if "generator" in parameters else {}
    for done, timestep in enumerate(path.timesteps):
        if watch is not None:
            watch(done, latents)
        if "order" in parameters:  # diffusers assumes earlier steps even when it starts in the middle
            extra["order"] = min(done + 1, parameters["order"].default)
        output = predict(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(output, timestep, latents, **extra, return_dict=False)[0]
        if progress is not None:
            progress(len(latents))
    return latents
