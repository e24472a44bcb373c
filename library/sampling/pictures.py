"""Drawing pictures: text states, noise from a seed, the sampler's steps with guidance, decoding.

Classifier-free guidance: Ho and Salimans 2022 (arXiv 2207.12598), u + scale * (c - u).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.families.clip_tokenizer import CHUNK
from library.families.family import Family, Model, Tokenizer
from library.options.mistakes import Mistake, UserError
from library.sampling.prompts import PictureRequest, alike
from library.sampling.samplers import make_scheduler

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_CHUNKS = 3

Progress = Callable[[int, int], None]
"""Called after each step with (steps done, steps in all)."""

EncodePrompts = Callable[[Sequence[str], int], Tensor]
"""Texts and a number of chunks to the states (B, 75 chunks + 2, width) that the U-Net takes."""


def sample(
    model: Model,
    request: PictureRequest,
    seed: int,
    *,
    clip_skip: int | None = None,
    most_chunks: int = MOST_CHUNKS,
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
    most_chunks: int = MOST_CHUNKS,
    encode: EncodePrompts | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> list[Image]:
    """Draw pictures with the modules as they are, on their devices and in their dtypes; in the order of the requests.

    Requests of one size, sampler, steps, scale and number of chunks go through the U-Net together; `progress` is told
    of each such group anew. All noise of a picture comes from a CPU generator of its own seed: but for the order of
    floating-point sums, a seed means the same picture on every device and in every batch, and nothing of the program's
    own random state is touched. Prompts longer than 75 tokens take up to `most_chunks` chunks.
    `encode` takes the place of the model's text encoder, which may then be None; text encoder and U-Net run under
    `autocast`, and the U-Net is given numbers of `dtype`, None being its own.
    Raises UserError for an unknown sampler and for a picture that is no number in places, ValueError when there are
    not as many seeds as requests.
    """
    if len(requests) != len(seeds):
        raise ValueError(f"{len(requests)} pictures need as many seeds, not {len(seeds)}")
    encode = encode or partial(encode_prompts, model.family, model.tokenizer, model.text_encoder, clip_skip)
    pictures: dict[int, Image] = {}
    with torch.no_grad(), _evaluating(model):
        for places in _groups(model, requests, most_chunks):
            one_kind = [requests[place] for place in places]
            scheduler = make_scheduler(one_kind[0].sampler, model.prediction, model.zero_terminal_snr)
            generators = [torch.Generator("cpu").manual_seed(seeds[place]) for place in places]
            with autocast():
                context = encode(_all_texts(one_kind), chunks_of(model.tokenizer, one_kind[0], most_chunks))
            context = context.to(device=model.unet.device, dtype=dtype or model.unet.dtype)
            latents = _draw(model, scheduler, context, one_kind[0], generators, autocast, progress)
            for place, one in zip(places, latents.split(1), strict=True):  # decoding takes the most memory: one by one
                pixels = model.family.decode_latents(model.vae, one / model.family.latent.scale)[0]
                pictures[place] = to_image(_finite(pixels, requests[place]))
    return [pictures[place] for place in range(len(requests))]


def _groups(model: Model, requests: Sequence[PictureRequest], most_chunks: int) -> Iterator[list[int]]:
    """The places of the requests that share a batch: of equal settings and of as many chunks."""
    for places in alike(requests):
        chunks = [chunks_of(model.tokenizer, requests[place], most_chunks) for place in places]
        for count in dict.fromkeys(chunks):
            yield [place for place, own in zip(places, chunks, strict=True) if own == count]


def chunks_of(tokenizer: Tokenizer, request: PictureRequest, most_chunks: int = MOST_CHUNKS) -> int:
    """How many chunks of 75 tokens the texts of a picture take."""
    longest = max(tokenizer.count(text, weighted=True) for text in texts_of(request))
    return min(max(1, -(-longest // CHUNK)), max(1, most_chunks))


def texts_of(request: PictureRequest) -> list[str]:
    """The texts that a picture needs the states of, the negative prompt first."""
    return [request.negative_prompt, request.prompt] if guided(request) else [request.prompt]


def _all_texts(requests: Sequence[PictureRequest]) -> list[str]:
    """All without, then all with the prompt; only the latter where there is no guidance."""
    return [text for side in zip(*map(texts_of, requests), strict=True) for text in side]


def encode_prompts(
    family: Family, tokenizer: Tokenizer, text_encoder: Any, clip_skip: int | None, texts: Sequence[str], chunks: int
) -> Tensor:
    """See EncodePrompts: by a text encoder on its device. Weights such as (dog:1.3) count as in weighted captions."""
    ids, weights = tokenizer.weighted(texts, chunks)
    plain = bool((weights == 1).all())
    return family.encode_text(text_encoder, ids.to(text_encoder.device), clip_skip, None if plain else weights)


def guided(request: PictureRequest) -> bool:
    """Whether the picture is drawn with guidance: a scale of 1 is the prompt alone."""
    return request.scale > 1


def _draw(
    model: Model,
    scheduler: Any,
    context: Tensor,
    request: PictureRequest,
    generators: list[torch.Generator],
    autocast: Callable[[], AbstractContextManager[Any]],
    progress: Progress | None,
) -> Tensor:
    """Latents (B, C, h, w) float32, scaled as the U-Net sees them; `request` tells what all of them share."""
    unet, space = model.unet, model.family.latent
    scheduler.set_timesteps(request.steps, device=unet.device)
    shape = (1, space.channels, request.height // space.stride, request.width // space.stride)
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    latents: Tensor = noise.to(unet.device) * scheduler.init_noise_sigma
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generators} if takes_generator else {}
    copies = len(context) // len(generators)
    for done, timestep in enumerate(scheduler.timesteps, start=1):
        seen = scheduler.scale_model_input(latents, timestep)
        rows = seen.repeat(copies, 1, 1, 1).to(context.dtype)
        with autocast():
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
    whole = [module for module in (model.unet, model.vae, model.text_encoder) if module is not None]
    were = [(module, module.training) for part in whole for module in part.modules()]
    try:
        for part in whole:
            part.eval()
        yield
    finally:
        for module, training in were:
            module.training = training


def _finite(pixels: Tensor, request: PictureRequest) -> Tensor:
    """The pixels, unless some are no numbers: such a picture would be black there and not say why."""
    if not pixels.isfinite().all():
        what = f'the picture of "{request.prompt}" holds values that are no numbers'
        remedy = (
            "try bf16 or full precision instead of fp16, at least for the VAE (--no_half_vae); or the model is broken"
        )
        raise UserError([Mistake(what, remedy)])
    return pixels


def to_image(pixels: Tensor) -> Image:
    """A picture of 8 bits a channel from pixels (3, H, W) in about [-1, 1]; what lies outside is clipped."""
    from PIL import Image

    scaled = (pixels.float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray((scaled * 255).round().astype("uint8"))
