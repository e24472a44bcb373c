"""Draw images: encode prompts, start from seeded noise, run the sampler with guidance, decode.

Classifier-free guidance: Ho and Salimans 2022 (arXiv 2207.12598), u + scale * (c - u).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.families.empty_text import zero_empty
from library.families.family import AS_TRAINED, Conditioning, Family, Model, TextSettings, Tokenizer
from library.options.mistakes import Mistake, UserError
from library.runtime.eval_mode import eval_mode
from library.sampling.prompts import ImageRequest, group_requests
from library.sampling.samplers import make_scheduler
from library.sampling.sampling_path import (
    Estimates,
    HandOver,
    Progress,
    Unfinished,
    begin,
    follow,
    go_on,
    set_timesteps,
)

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_CHUNKS = 3
# aesthetic scores of diffusers' pipelines, for the prompt and the negative prompt
SCORE, NEGATIVE_SCORE = 6.0, 2.5

EncodePrompts = Callable[[Sequence[str], int], Mapping[str, Tensor]]
"""Encodes texts, up to a number of tokens; returns what library.families.family.EncodeText does."""


def sample(
    model: Model,
    request: ImageRequest,
    seed: int,
    *,
    settings: TextSettings = AS_TRAINED,
    max_chunks: int = MAX_CHUNKS,
    progress: Progress | None = None,
) -> Image:
    """Draw one image. See sample_batch."""
    return sample_batch(model, [request], [seed], settings=settings, max_chunks=max_chunks, progress=progress)[0]


def sample_batch(  # noqa: PLR0913 - independent settings with defaults, passed by name
    model: Model,
    requests: Sequence[ImageRequest],
    seeds: Sequence[int],
    *,
    init_latents: Sequence[Tensor] | None = None,
    strength: float = 1.0,
    unfinished: Sequence[Unfinished] | None = None,
    hand_over: HandOver | None = None,
    estimates: Estimates | None = None,
    settings: TextSettings = AS_TRAINED,
    max_chunks: int = MAX_CHUNKS,
    encode: EncodePrompts | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> list[Image]:
    """Draw images in the order of the requests, on the modules' devices and in their dtypes.

    Requests with the same size, sampler, steps, scale and prompt length share a batch. The noise of an image comes from
    a CPU generator seeded with its seed, so a seed gives the same image on every device and in every batch, up to
    rounding; the global random state is not used. Prompts may take up to `max_chunks` times the tokens of one text
    encoder pass.
    `init_latents`: for image-to-image, unscaled latents (C, h, w) for each request, which also set the image size; only
    the steps in the last share `strength` of the timesteps are run. `unfinished`: images that another model handed over
    (`hand_over` keeps those of this call), to be finished on their path and with their random numbers; seeds are
    ignored then. `estimates` is told of the clean images that are predicted on the way. `encode` replaces the model's
    text encoders. Encoding and the backbone run under `autocast`, with backbone inputs in `dtype` (None: the backbone's
    own); sizes and scores are always float32.
    Raises UserError for an unknown sampler, for too few steps at this strength and for NaN or infinite pixels;
    ValueError unless there are as many seeds, init latents and unfinished images as requests.
    """
    for values in (seeds, init_latents, unfinished):
        if values is not None and len(requests) != len(values):
            raise ValueError(f"{len(requests)} images need as many seeds and init latents, not {len(values)}")
    if init_latents is not None:
        pairs = zip(requests, init_latents, strict=True)
        requests = [with_size_of(latents, request, model.family) for request, latents in pairs]
    encode = encode or partial(encode_prompts, model.family, model.tokenizer, model.text_encoders, settings)
    images: dict[int, Image] = {}
    with torch.no_grad(), eval_mode(model.modules().values()):
        for places in _groups(model, requests, max_chunks):
            group = [requests[place] for place in places]
            if unfinished is None:
                init = None if init_latents is None else torch.stack([init_latents[place] for place in places])
                path = begin(model, group[0], [seeds[place] for place in places], init, strength)
            else:
                path = go_on(model, group[0], [unfinished[place] for place in places])
            with autocast():
                outputs = encode(_all_texts(group), token_limit(model.tokenizer, group[0], max_chunks))
            conditioning = _conditioning(outputs, group, model.backbone.device, dtype or model.backbone.dtype)
            predict = _guided_prediction(model, conditioning, group[0].scale, autocast)
            watch = None if hand_over is None else hand_over.watch(places, path)
            predicted = None if estimates is None else estimates.watch(model, places, path)
            latents = follow(path, predict, progress, watch, predicted)
            for place, one in zip(places, torch.split(latents, 1), strict=True):  # decoding needs the most memory
                pixels = model.family.decode_latents(model.vae, model.family.latent.unscaled(one))[0]
                images[place] = to_image(_check_finite(pixels, requests[place]))
    return [images[place] for place in range(len(requests))]


def count_steps(model: Model, requests: Sequence[ImageRequest], strength: float | None = None) -> int:
    """Steps that `progress` of sample_batch is told of, over all images. `strength` None: from noise."""
    counts: dict[tuple[str, int], int] = {}
    for request in requests:
        key = (request.sampler, request.steps)
        if key not in counts:
            scheduler = make_scheduler(request.sampler, model.family.process, model.prediction)
            counts[key] = len(set_timesteps(model, scheduler, request, strength))
    return sum(counts[request.sampler, request.steps] for request in requests)


def with_size_of(latents: Tensor, request: ImageRequest, family: Family) -> ImageRequest:
    """The request with the image size of latents (C, h, w)."""
    height, width = (side * family.latent.stride for side in latents.shape[-2:])
    return replace(request, width=width, height=height)


def _groups(model: Model, requests: Sequence[ImageRequest], max_chunks: int) -> Iterator[list[int]]:
    """Yield the indices of requests that share a batch: same settings, same number of text chunks."""
    for places in group_requests(requests):
        limits = [token_limit(model.tokenizer, requests[place], max_chunks) for place in places]
        for limit in dict.fromkeys(limits):
            yield [place for place, own_limit in zip(places, limits, strict=True) if own_limit == limit]


def token_limit(tokenizer: Tokenizer, request: ImageRequest, max_chunks: int = MAX_CHUNKS) -> int:
    """Return how many tokens of an image's texts are read, at most `max_chunks` times those of one chunk."""
    at_once = tokenizer.configured(weighted=True)
    longest = max(at_once.count(text) for text in texts_of(request))
    return tokenizer.configured(max_tokens=min(longest, at_once.limit * max_chunks), weighted=True).limit


def texts_of(request: ImageRequest) -> list[str]:
    """Return the texts to encode for an image, the negative prompt first."""
    return [request.negative_prompt, request.prompt] if guided(request) else [request.prompt]


def _all_texts(requests: Sequence[ImageRequest]) -> list[str]:
    """Return all negative prompts, then all prompts; only the prompts without guidance."""
    return [text for side in zip(*map(texts_of, requests), strict=True) for text in side]


def encode_prompts(
    family: Family,
    tokenizer: Tokenizer,
    text_encoders: Mapping[str, Any],
    settings: TextSettings,
    texts: Sequence[str],
    max_tokens: int,
) -> dict[str, Tensor]:
    """Encode texts as EncodePrompts describes; weights such as (dog:1.3) work as in weighted captions."""
    text_inputs = tokenizer.configured(max_tokens=max_tokens, weighted=True)(texts)
    on_device = {name: text_input.to(text_encoders[name].device) for name, text_input in text_inputs.items()}
    outputs = family.encode_text(text_encoders, on_device, settings)
    return zero_empty(outputs, texts) if settings.empty_is_zero else outputs


def guided(request: ImageRequest) -> bool:
    """Whether classifier-free guidance is used: at scale 1 only the prompt counts."""
    return request.scale > 1


def _conditioning(
    outputs: Mapping[str, Tensor], requests: Sequence[ImageRequest], device: torch.device, dtype: torch.dtype
) -> Conditioning:
    """Conditioning for images of one size, rows of the negative prompts first. Sizes describe uncropped images."""
    height, width = requests[0].height, requests[0].width
    scores = [NEGATIVE_SCORE, SCORE] if guided(requests[0]) else [SCORE]
    sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=device)
    return {
        **{name: values.to(device=device, dtype=dtype) for name, values in outputs.items()},
        "sizes": sizes.repeat(len(scores) * len(requests), 1),
        "score": torch.tensor(scores, dtype=torch.float32, device=device).repeat_interleave(len(requests)),
    }


def _guided_prediction(
    model: Model, conditioning: Conditioning, scale: float, autocast: Callable[[], AbstractContextManager[Any]]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function from latents (B, C, h, w) and a timestep to the prediction, guided if the conditioning has rows
    of negative prompts."""
    states = conditioning["states"]

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        copies = len(states) // len(latents)
        rows = latents.repeat(copies, 1, 1, 1).to(states.dtype)
        with autocast():
            output = model.family.predict(model.backbone, rows, timestep.expand(len(states)), conditioning).float()
        if copies == 1:
            return output
        negative, positive = output.chunk(2)
        return negative + scale * (positive - negative)

    return predict


def _check_finite(pixels: Tensor, request: ImageRequest) -> Tensor:
    """Return the pixels. Raises UserError for NaN or infinite values, which would only show as black."""
    if not pixels.isfinite().all():
        what = f'the image of "{request.prompt}" contains NaN or infinite values'
        remedy = (
            "use bf16 or float instead of fp16, at least for the VAE (--no_half_vae); otherwise the model is damaged"
        )
        raise UserError([Mistake(what, remedy)])
    return pixels


def to_image(pixels: Tensor) -> Image:
    """Convert pixels (3, H, W) in about [-1, 1], clipped, to an 8-bit image."""
    from PIL import Image

    scaled = (pixels.float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray((scaled * 255).round().astype("uint8"))
