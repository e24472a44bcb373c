"""Drawing images: text states, noise from a seed, the sampler's steps with guidance, decoding.

An image begins as noise, or as another one that is refined: noised to where the steps begin (Meng et al. 2021,
arXiv 2108.01073). Classifier-free guidance: Ho and Salimans 2022 (arXiv 2207.12598), u + scale * (c - u).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.families.empty_text import zero_empty
from library.families.family import AS_TRAINED, Conditioning, Family, Model, TextSettings, Tokenizer
from library.options.mistakes import Mistake, UserError
from library.sampling.prompts import ImageRequest, group_requests
from library.sampling.samplers import begin_below, make_scheduler

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_CHUNKS = 3
# what diffusers' pipelines tell a model of how beautiful the image is, with the prompt and with the negative one
SCORE, NEGATIVE_SCORE = 6.0, 2.5

Progress = Callable[[int, int], None]
"""Called after each step with (steps done, steps in all)."""

EncodePrompts = Callable[[Sequence[str], int], Mapping[str, Tensor]]
"""Texts and how many tokens of them are read to what text encoders give: see library.families.family.EncodeText."""


def sample(
    model: Model,
    request: ImageRequest,
    seed: int,
    *,
    settings: TextSettings = AS_TRAINED,
    max_chunks: int = MAX_CHUNKS,
    progress: Progress | None = None,
) -> Image:
    """Draw one image: a batch of one. See sample_batch."""
    return sample_batch(model, [request], [seed], settings=settings, max_chunks=max_chunks, progress=progress)[0]


def sample_batch(  # noqa: PLR0913 - being redrawn
    model: Model,
    requests: Sequence[ImageRequest],
    seeds: Sequence[int],
    *,
    init_latents: Sequence[Tensor] | None = None,
    strength: float = 1.0,
    settings: TextSettings = AS_TRAINED,
    max_chunks: int = MAX_CHUNKS,
    encode: EncodePrompts | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> list[Image]:
    """Draw images with the modules as they are, on their devices and in their dtypes; in the order of the requests.

    Requests of one size, sampler, steps, scale and length of texts go through the backbone together; `progress` is
    told of each such group anew. All noise of an image comes from a CPU generator of its own seed: but for the order of
    floating-point sums, a seed means the same image on every device and in every batch, and nothing of the program's
    own random state is touched. Prompts longer than what text encoders read at once take up to `max_chunks` times
    that.
    `init_latents`: latents (C, h, w) for each request, not scaled, of images that are refined in place of drawing from
    noise: their sizes count, and only those steps are made that lie in the last share `strength` of the timesteps.
    `encode` takes the place of the model's text encoders, which are then not needed; they and the backbone run under
    `autocast`, and the backbone is given numbers of `dtype`, None being its own; sizes and scores are float32 always.
    Raises UserError for an unknown sampler, for too few steps to refine anything and for an image that is no number in
    places, ValueError when there are not as many seeds and starts as requests.
    """
    for each in (seeds, seeds if init_latents is None else init_latents):
        if len(requests) != len(each):
            raise ValueError(f"{len(requests)} images need as many seeds, and starts if any, not {len(each)}")
    if init_latents is not None:
        requests = [sized(one, start, model.family) for one, start in zip(requests, init_latents, strict=True)]
    encode = encode or partial(encode_prompts, model.family, model.tokenizer, model.text_encoders, settings)
    images: dict[int, Image] = {}
    with torch.no_grad(), _evaluating(model):
        for places in _groups(model, requests, max_chunks):
            one_kind = [requests[place] for place in places]
            scheduler = make_scheduler(
                one_kind[0].sampler, model.family.process, model.prediction, model.zero_terminal_snr
            )
            generators = [torch.Generator("cpu").manual_seed(seeds[place]) for place in places]
            with autocast():
                outputs = encode(_all_texts(one_kind), token_limit(model.tokenizer, one_kind[0], max_chunks))
            conditioning = _conditioning(outputs, one_kind, model.backbone.device, dtype or model.backbone.dtype)
            begin = None if init_latents is None else torch.stack([init_latents[place] for place in places])
            latents, timesteps = _first(model, scheduler, one_kind[0], generators, begin, strength)
            latents = _draw(
                model, scheduler, timesteps, latents, conditioning, one_kind[0], generators, autocast, progress
            )
            for place, one in zip(places, torch.split(latents, 1), strict=True):  # decoding takes most: one by one
                pixels = model.family.decode_latents(model.vae, model.family.latent.unscaled(one))[0]
                images[place] = to_image(_finite(pixels, requests[place]))
    return [images[place] for place in range(len(requests))]


def sized(request: ImageRequest, start: Tensor, family: Family) -> ImageRequest:
    """The request with the size of the image that it refines, whose latents are (C, h, w)."""
    height, width = (side * family.latent.stride for side in start.shape[-2:])
    return replace(request, width=width, height=height)


def _groups(model: Model, requests: Sequence[ImageRequest], max_chunks: int) -> Iterator[list[int]]:
    """The places of the requests that share a batch: of equal settings, with as many tokens read of their texts."""
    for places in group_requests(requests):
        limits = [token_limit(model.tokenizer, requests[place], max_chunks) for place in places]
        for limit in dict.fromkeys(limits):
            yield [place for place, own in zip(places, limits, strict=True) if own == limit]


def token_limit(tokenizer: Tokenizer, request: ImageRequest, max_chunks: int = MAX_CHUNKS) -> int:
    """How many tokens are read of the texts of an image, at most `max_chunks` times what is read at once."""
    at_once = tokenizer.configured(weighted=True)
    longest = max(at_once.count(text) for text in texts_of(request))
    return tokenizer.configured(max_tokens=min(longest, at_once.limit * max_chunks), weighted=True).limit


def texts_of(request: ImageRequest) -> list[str]:
    """The texts that an image needs the states of, the negative prompt first."""
    return [request.negative_prompt, request.prompt] if guided(request) else [request.prompt]


def _all_texts(requests: Sequence[ImageRequest]) -> list[str]:
    """All without, then all with the prompt; only the latter where there is no guidance."""
    return [text for side in zip(*map(texts_of, requests), strict=True) for text in side]


def encode_prompts(
    family: Family,
    tokenizer: Tokenizer,
    text_encoders: Mapping[str, Any],
    settings: TextSettings,
    texts: Sequence[str],
    max_tokens: int,
) -> dict[str, Tensor]:
    """See EncodePrompts: by text encoders on their device. Weights such as (dog:1.3) count as in weighted captions."""
    text_inputs = tokenizer.configured(max_tokens=max_tokens, weighted=True)(texts)
    there = {name: one.to(text_encoders[name].device) for name, one in text_inputs.items()}
    outputs = family.encode_text(text_encoders, there, settings)
    return zero_empty(outputs, texts) if settings.empty_is_zero else outputs


def guided(request: ImageRequest) -> bool:
    """Whether the image is drawn with guidance: a scale of 1 is the prompt alone."""
    return request.scale > 1


def _conditioning(
    outputs: Mapping[str, Tensor], requests: Sequence[ImageRequest], device: torch.device, dtype: torch.dtype
) -> Conditioning:
    """What the model is told of images of one size, the rows without the prompt first: each shows a whole file."""
    height, width = requests[0].height, requests[0].width
    scores = [NEGATIVE_SCORE, SCORE] if guided(requests[0]) else [SCORE]
    sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=device)
    return {
        **{name: values.to(device=device, dtype=dtype) for name, values in outputs.items()},
        "sizes": sizes.repeat(len(scores) * len(requests), 1),
        "score": torch.tensor(scores, dtype=torch.float32, device=device).repeat_interleave(len(requests)),
    }


def _first(
    model: Model,
    scheduler: Any,
    request: ImageRequest,
    generators: Sequence[torch.Generator],
    starts: Tensor | None,
    strength: float,
) -> tuple[Tensor, Tensor]:
    """Latents (B, C, h, w) float32 to begin with, noise or noised `starts`, and the timesteps to go through."""
    device, space = model.backbone.device, model.family.latent
    scheduler.set_timesteps(request.steps, device=device)
    shape = (1, space.channels, request.height // space.stride, request.width // space.stride)
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    if starts is None:
        return noise * scheduler.init_noise_sigma, scheduler.timesteps
    timesteps = begin_below(request.sampler, scheduler, round(strength * model.family.process.timesteps))
    return scheduler.add_noise(space.scaled(starts.to(noise)), noise, timesteps[:1]), timesteps


def _draw(  # noqa: PLR0913 - being redrawn
    model: Model,
    scheduler: Any,
    timesteps: Tensor,
    latents: Tensor,
    conditioning: Conditioning,
    request: ImageRequest,
    generators: list[torch.Generator],
    autocast: Callable[[], AbstractContextManager[Any]],
    progress: Progress | None,
) -> Tensor:
    """Latents (B, C, h, w) float32, scaled as the backbone sees them; `request` tells what all of them share."""
    takes = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"generator": generators} if "generator" in takes else {}
    states = conditioning["states"]
    copies = len(states) // len(generators)
    for done, timestep in enumerate(timesteps, start=1):
        if "order" in takes:  # diffusers counts on steps that were not made when it begins in the middle
            extra["order"] = min(done, takes["order"].default)
        seen = scheduler.scale_model_input(latents, timestep)
        rows = seen.repeat(copies, 1, 1, 1).to(states.dtype)
        with autocast():
            output = model.family.predict(model.backbone, rows, timestep.expand(len(states)), conditioning).float()
        if guided(request):
            without, with_prompt = output.chunk(2)
            output = without + request.scale * (with_prompt - without)
        latents = scheduler.step(output, timestep, latents, **extra, return_dict=False)[0]
        if progress is not None:
            progress(done, len(timesteps))
    return latents


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Switch dropout and gradient checkpointing off for a while, and back to what they were."""
    whole = list(model.modules().values())
    were = [(module, module.training) for part in whole for module in part.modules()]
    try:
        for part in whole:
            part.eval()
        yield
    finally:
        for module, training in were:
            module.training = training


def _finite(pixels: Tensor, request: ImageRequest) -> Tensor:
    """The pixels, unless some are no numbers: such an image would be black there and not say why."""
    if not pixels.isfinite().all():
        what = f'the image of "{request.prompt}" holds values that are no numbers'
        remedy = (
            "try bf16 or full precision instead of fp16, at least for the VAE (--no_half_vae); or the model is broken"
        )
        raise UserError([Mistake(what, remedy)])
    return pixels


def to_image(pixels: Tensor) -> Image:
    """An image of 8 bits a channel from pixels (3, H, W) in about [-1, 1]; what lies outside is clipped."""
    from PIL import Image

    scaled = (pixels.float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray((scaled * 255).round().astype("uint8"))
