"""Drawing a picture: text states, noise from a seed, the sampler's steps with guidance, decoding.

Classifier-free guidance: Ho and Salimans 2022 (arXiv 2207.12598), u + scale * (c - u).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
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
    """Draw one picture with the modules as they are, on their devices and in their dtypes.

    All noise comes from one CPU generator of `seed`, so a seed means the same picture on every device, and nothing of
    the program's own random state is touched. Prompts longer than 75 tokens take up to `most_chunks` chunks.
    Raises UserError for an unknown sampler.
    """
    scheduler = make_scheduler(request.sampler, model.prediction)
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad(), _evaluating(model):
        context = _context(model, request, clip_skip, most_chunks)
        latents = _draw(model, scheduler, context, request, generator, progress)
        pixels = model.family.decode_latents(model.vae, latents / model.family.latent.scale)
    return to_image(pixels[0])


def _context(model: Model, request: PictureRequest, clip_skip: int | None, most_chunks: int) -> Tensor:
    """Text states (2, L, width): without and with the prompt; (1, L, width) where there is no guidance."""
    texts = [request.negative_prompt, request.prompt] if guided(request) else [request.prompt]
    longest = max(model.tokenizer.count(text) for text in texts)
    chunks = min(max(1, -(-longest // CHUNK)), max(1, most_chunks))
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
    generator: torch.Generator,
    progress: Progress | None,
) -> Tensor:
    """Latents (1, C, h, w) float32, scaled as the U-Net sees them."""
    unet, space = model.unet, model.family.latent
    context = context.to(device=unet.device, dtype=unet.dtype)
    scheduler.set_timesteps(request.steps, device=unet.device)
    shape = (1, space.channels, request.height // space.stride, request.width // space.stride)
    latents: Tensor = torch.randn(shape, generator=generator).to(unet.device) * scheduler.init_noise_sigma
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    for done, timestep in enumerate(scheduler.timesteps, start=1):
        seen = scheduler.scale_model_input(latents, timestep)
        rows = seen.expand(len(context), *shape[1:]).to(unet.dtype)
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
