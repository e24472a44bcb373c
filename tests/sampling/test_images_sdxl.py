"""Stable Diffusion XL and its refiner draw what diffusers' own pipelines draw."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from library.checkpoints.files import read_header
from library.families.clip.tokenizer import ClipTokenizer
from library.families.family import TextSettings
from library.families.registry import load_model
from library.families.sd.sdxl import SDXL
from library.sampling.images import encode_prompts, sample, sample_batch
from library.sampling.prompts import ImageRequest
from library.sampling.samplers import make_scheduler
from library.sampling.sampling_path import HandOver
from tests import tiny

# diffusers' and numpy's remarks about their own future
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

REQUEST = ImageRequest("a photo of sks dog!", "blurry", width=64, height=72, steps=3, sampler="euler")
ZERO = TextSettings(empty_is_zero=True)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(read_header(tiny.write_single_file(tmp_path_factory.mktemp("m") / "x.safetensors", "sdxl")))


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(read_header(tiny.write_single_file(tmp_path_factory.mktemp("m") / "x.safetensors", "refiner")))


@pytest.fixture(scope="module")
def pipeline() -> Any:
    from diffusers import StableDiffusionXLPipeline

    parts = tiny.diffusers_modules("sdxl")
    made = StableDiffusionXLPipeline(
        parts.vae, parts.text_encoder, parts.text_encoder_2, tokenizer(49407), tokenizer(0), parts.unet,
        make_scheduler("euler", SDXL.process, "epsilon"), force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def refining() -> Any:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    parts = tiny.diffusers_modules("refiner")
    made = StableDiffusionXLImg2ImgPipeline(
        parts.vae, None, parts.text_encoder_2, None, tokenizer(0), parts.unet,
        make_scheduler("euler", SDXL.process, "epsilon"),
        requires_aesthetics_score=True, force_zeros_for_empty_prompt=False, add_watermarker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def tokenizer(pad_id: int) -> Any:
    from transformers import CLIPTokenizer

    ours = ClipTokenizer(pad_id)
    pairs = [tuple(merge.split(" ")) for merge in ours.merges]
    return CLIPTokenizer(vocab=dict(ours.vocab), merges=pairs, pad_token=ours.pad_text, model_max_length=77)


def settings_of(request: ImageRequest, seed: int) -> dict[str, Any]:
    return {
        "num_inference_steps": request.steps,
        "guidance_scale": request.scale,
        "generator": torch.Generator().manual_seed(seed),
    }


def drawn(pipeline: Any, request: ImageRequest, seed: int, **texts: Any) -> Any:
    pipeline.scheduler = make_scheduler(request.sampler, SDXL.process, "epsilon")
    texts = texts or {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
    return pipeline(**texts, width=request.width, height=request.height, **settings_of(request, seed)).images[0]


def far_apart(one: Any, other: Any) -> int:
    """The largest difference of two images in any colour of any pixel."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_sdxl_draws_what_diffusers_draws(sdxl: Any, pipeline: Any, sampler: str) -> None:
    request = replace(REQUEST, sampler=sampler)
    ours = sample(sdxl, request, 7)
    assert ours.size == (64, 72) and far_apart(ours, drawn(pipeline, request, 7)) <= 1
    assert far_apart(ours, drawn(pipeline, replace(request, prompt="a cat"), 7)) > 1  # the text does count


def test_a_negative_prompt_that_is_not_given_is_zeros_where_it_shall_be(sdxl: Any, pipeline: Any) -> None:
    """force_zeros_for_empty_prompt takes no negative prompt for zeros, but an empty one for a text."""
    request = replace(REQUEST, negative_prompt="")
    zero, encoded = sample(sdxl, request, 7, settings=ZERO), sample(sdxl, request, 7)
    assert far_apart(zero, drawn(pipeline, request, 7, prompt=request.prompt)) <= 1
    assert far_apart(encoded, drawn(pipeline, request, 7)) <= 1
    assert far_apart(zero, encoded) > 1


def test_two_prompts_at_once_and_no_guidance(sdxl: Any, pipeline: Any) -> None:
    for scale in (5.0, 1.0):
        requests = [replace(REQUEST, scale=scale), replace(REQUEST, prompt="a cat", negative_prompt="", scale=scale)]
        together = sample_batch(sdxl, requests, [3, 4])
        for request, seed, ours in zip(requests, (3, 4), together, strict=True):
            assert far_apart(ours, drawn(pipeline, request, seed)) <= 1


def test_a_prompt_of_two_chunks(sdxl: Any, pipeline: Any) -> None:
    """Each chunk by itself through both encoders, joined: the first begin, all texts, the last end; the pooled vector
    is that of the first chunk."""
    request = replace(REQUEST, prompt="red dog " * 50)
    given: dict[str, Tensor] = {}
    for which, text in (("", request.prompt), ("negative_", request.negative_prompt)):
        states, pooled = in_chunks(pipeline, text)
        given |= {f"{which}prompt_embeds": states, f"{which}pooled_prompt_embeds": pooled}
    assert given["prompt_embeds"].shape == (1, 152, 192)
    assert far_apart(sample(sdxl, request, 7), drawn(pipeline, request, 7, **given)) <= 1


def in_chunks(pipeline: Any, text: str) -> tuple[Tensor, Tensor]:
    """States (1, 152, width) and pooled vector of a text in two chunks, by transformers."""
    states = []
    for encoder, pad in ((pipeline.text_encoder, 49407), (pipeline.text_encoder_2, 0)):
        words = tokenizer(pad)(text, add_special_tokens=False, truncation=False)["input_ids"]
        row = (words + [49407] + [pad] * 150)[:151]
        first = [49406, *row[:75], 49407 if len(words) >= 75 else pad]
        last = [49406, *(row[75:150] if len(words) >= 75 else [49407, *[pad] * 74]), pad]
        with torch.no_grad():
            found = encoder(torch.tensor([first, last]), output_hidden_states=True)
        hidden = found.hidden_states[-2]
        states.append(torch.cat([hidden[0, :76], hidden[1, 1:]])[None])
    return torch.cat(states, -1), found.text_embeds[:1]


def test_what_the_model_is_told_stays_exact_in_half_precision(sdxl: Any) -> None:
    """bfloat16 knows no number between 1024 and 1032."""
    told: list[dict[str, Tensor]] = []

    def predict(unet: Any, noisy: Tensor, timesteps: Tensor, given: Any) -> Tensor:
        told.append(given)
        return torch.zeros_like(noisy)

    watched = replace(sdxl, family=replace(sdxl.family, predict=predict, decode_latents=decode_nothing))
    request = replace(REQUEST, width=1032, height=1048, steps=1)
    sample_batch(watched, [request, request], [1, 2], dtype=torch.bfloat16)
    (given,) = told
    assert given["sizes"].tolist() == [[1048, 1032, 0, 0, 1048, 1032]] * 4 and given["sizes"].dtype == torch.float32
    assert given["score"].tolist() == [2.5, 2.5, 6.0, 6.0] and given["score"].dtype == torch.float32
    assert given["states"].dtype == given["pooled"].dtype == torch.bfloat16


def decode_nothing(vae: Any, latents: Tensor) -> Tensor:
    return torch.zeros(1, 3, 8, 8)


def test_a_text_without_a_word_is_zeros_only_where_it_shall_be(sdxl: Any) -> None:
    texts = ["a dog", "", "a cat", ""]
    for settings, zero in ((ZERO, True), (TextSettings(), False)):
        found = encode_prompts(sdxl.family, sdxl.tokenizer, sdxl.text_encoders, settings, texts, 75)
        assert found.keys() == {"states", "pooled"}
        for values in found.values():
            assert [bool((row == 0).all()) for row in values] == [False, zero, False, zero]


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "heun"])
def test_the_refiner_refines_what_diffusers_refines(refiner: Any, refining: Any, sampler: str) -> None:
    """Ten steps, the last two of which lie below timestep 200; diffusers takes them by number."""
    start = torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(1)) * 5
    request = replace(REQUEST, sampler=sampler, steps=10, width=512)
    (ours,) = sample_batch(refiner, [request], [7], init_latents=[start], strength=0.2)
    refining.scheduler = make_scheduler(sampler, SDXL.process, "epsilon")
    theirs = refining(
        request.prompt,
        negative_prompt=request.negative_prompt,
        image=start[None] * refining.vae.config.scaling_factor,
        strength=0.2,
        aesthetic_score=6.0,
        negative_aesthetic_score=2.5,
        **settings_of(request, 7),
    ).images[0]
    assert ours.size == (64, 72) and far_apart(ours, theirs) <= 1


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmsolver++"])
def test_base_and_refiner_draw_what_diffusers_chain_draws(
    sdxl: Any, refiner: Any, pipeline: Any, refining: Any, sampler: str
) -> None:
    """denoising_end and denoising_start 0.8: ten steps, the last two of which lie below timestep 200."""
    request = replace(REQUEST, sampler=sampler, steps=10)
    hand_over = HandOver(200)
    plain = sample(sdxl, request, 7)
    assert far_apart(sample_batch(sdxl, [request], [7], hand_over=hand_over)[0], plain) == 0
    (refined,) = sample_batch(refiner, [request], [7], unfinished=[hand_over.kept[0]])
    texts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
    told = settings_of(request, 7)  # one generator for both, as in the documentation of diffusers
    pipeline.scheduler = make_scheduler(sampler, SDXL.process, "epsilon")
    latents = pipeline(**texts, **told, width=64, height=72, denoising_end=0.8, output_type="latent").images
    refining.scheduler = make_scheduler(sampler, SDXL.process, "epsilon")
    theirs = refining(**texts, **told, image=latents, denoising_start=0.8).images[0]
    assert refined.size == (64, 72) and far_apart(refined, theirs) <= 1 and far_apart(refined, plain) > 1
