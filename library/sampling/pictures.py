"""Drawing pictures: text states, noise from a seed, the sampler's steps with guidance, decoding.

Classifier-free guidance: Ho and Salimans 2022 (arXiv 2207.12598), u + scale * (c - u).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.families.clip_tokenizer import CHUNK
from library.families.family import Model
from library.sampling.prompts import PictureRequest
from library.sampling.samplers import make_scheduler

if TYPE_CHECKING:
    from PIL.Image import Image

Progress = Callable[[int, int], None]
"""Called after each step with (steps done, steps in all)."""


def sample(
    model: Model,
    request: PictureRequest,
    seed: int,
    *,
    clip_skip: int | None = None,
    most_chunks: int = 3,
    progress: Progress | None = None,
) -> Image:
    """Draw one picture: a batch of one. See sample_batch."""
    return sample_batch(model, [request], [seed], clip_skip=clip_skip, most_chunks=most_chunks, progress=progress)[0]


def sample_batch(
    model: Model,
    requests: Sequence[PictureRequest],
    seeds: Sequence[int],
    *,
    clip_skip: int | None = None,
    most_chunks: int = 3,
    progress: Progress | None = None,
) -> list[Image]:
    """Draw pictures with the modules as they are, on their devices and in their dtypes; in the order of the requests.

    Requests of one size, sampler, steps, scale and number of chunks go through the U-Net together; `progress` is told
    of each such group anew. All noise of a picture comes from a CPU generator of its own seed: but for the order of
    floating-point sums, a seed means the same picture on every device and in every batch, and nothing of the program's
    own random state is touched. Prompts longer than 75 tokens take up to `most_chunks` chunks.
    Raises UserError for an unknown sampler, ValueError when there are not as many seeds as requests.
    """
    if len(requests) != len(seeds):
        raise ValueError(f"{len(requests)} pictures need as many seeds, not {len(seeds)}")
    groups: dict[Any, list[int]] = {}
    for place, request in enumerate(requests):
        settings = (request.width, request.height, request.sampler, request.steps, request.scale)
        groups.setdefault((settings, _chunks(model, request, most_chunks)), []).append(place)
    pictures: dict[int, Image] = {}
    with torch.no_grad(), _evaluating(model):
        for (_, chunks), places in groups.items():
            alike = [requests[place] for place in places]
            scheduler = make_scheduler(alike[0].sampler, model.prediction)
            generators = [torch.Generator("cpu").manual_seed(seeds[place]) for place in places]
            context = _context(model, alike, chunks, clip_skip)
            latents = _draw(model, scheduler, context, alike[0], generators, progress)
            for place, one in zip(places, latents.split(1), strict=True):  # decoding takes the most memory: one by one
                pictures[place] = to_image(model.family.decode_latents(model.vae, one / model.family.latent.scale)[0])
    return [pictures[place] for place in range(len(requests))]


def _chunks(model: Model, request: PictureRequest, most_chunks: int) -> int:
    longest = max(model.tokenizer.count(text) for text in _texts(request))
    return min(max(1, -(-longest // CHUNK)), max(1, most_chunks))


def _texts(request: PictureRequest) -> list[str]:
    return [request.negative_prompt, request.prompt] if guided(request) else [request.prompt]


def _context(model: Model, requests: Sequence[PictureRequest], chunks: int, clip_skip: int | None) -> Tensor:
    """Text states (2B, L, width): all without, then all with the prompt; (B, L, width) where there is no guidance."""
    texts = [text for side in zip(*map(_texts, requests), strict=True) for text in side]
    ids = model.tokenizer.tensor(texts, chunks).to(model.text_encoder.device)
    return model.family.encode_text(model.text_encoder, ids, clip_skip)


def guided(request: PictureRequest) -> bool:
    """Whether the picture is drawn with guidance: a scale of 1 is the prompt alone."""
    return request.scale > 1


def _draw(
    model: Model,
    scheduler: Any,
    context: Tensor,
    request: PictureRequest,
    generators: list[torch.Generator],
    progress: Progress | None,
) -> Tensor:
    """Latents (B, C, h, w) float32, scaled as the U-Net sees them; `request` tells what all of them share."""
    unet, space = model.unet, model.family.latent
    context = context.to(device=unet.device, dtype=unet.dtype)
    scheduler.set_timesteps(request.steps, device=unet.device)
    shape = (1, space.channels, request.height // space.stride, request.width // space.stride)
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    latents: Tensor = noise.to(unet.device) * scheduler.init_noise_sigma
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generators} if takes_generator else {}
    copies = len(context) // len(generators)
    for done, timestep in enumerate(scheduler.timesteps, start=1):
        seen = scheduler.scale_model_input(latents, timestep)
        rows = seen.repeat(copies, 1, 1, 1).to(unet.dtype)
        output = model.family.predict(unet, rows, timestep.expand(len(context)), context).float()
        if guided(request):
            without, with_prompt = output.chunk(2)
            output = without + request.scale * (with_prompt - without)
        latents = scheduler.step(output, timestep, latents, **extra, return_dict=False)[0]
        if progress is not None:
            progress(done, len(scheduler.timesteps))
    return latents


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Switch dropout and gradient checkpointing off for a while, and back to what they were."""
    whole = (model.unet, model.vae, model.text_encoder)
    were = [(module, module.training) for part in whole for module in part.modules()]
    try:
        for part in whole:
            part.eval()
        yield
    finally:
        for module, training in were:
            module.training = training


def to_image(pixels: Tensor) -> Image:
    """A picture of 8 bits a channel from pixels (3, H, W) in about [-1, 1]; what lies outside is clipped."""
    from PIL import Image

    scaled = (pixels.float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray((scaled * 255).round().astype("uint8"))
