"""An image is the one that diffusers' own pipeline draws with the same scheduler and seed."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch

from library.checkpoints.files import read_header
from library.families.family import TextSettings
from library.families.registry import load_model
from library.options.mistakes import UserError
from library.sampling.images import count_steps, sample, sample_batch
from library.sampling.prompts import ImageRequest
from library.sampling.samplers import SAMPLERS, check_sampler, make_scheduler
from tests import tiny

# diffusers' and numpy's remarks about their own future
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

REQUEST = ImageRequest("a photo of sks dog", "blurry", width=64, height=72, steps=4)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    return load_model(read_header(tiny.write_single_file(tmp_path_factory.mktemp("m") / "x.safetensors", "sd1")))


@pytest.fixture(scope="module")
def sd2(tmp_path_factory):
    path = tiny.write_single_file(tmp_path_factory.mktemp("m") / "x.safetensors", "sd2")
    return load_model(read_header(path), prediction="v")


def changed(request: ImageRequest, **changes) -> ImageRequest:
    return replace(request, **changes)


def by_diffusers(model, request: ImageRequest, seed: int) -> np.ndarray:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    ours = model.tokenizer.by_encoder["text_encoder"]
    pairs = [tuple(merge.split(" ")) for merge in ours.merges]
    tokenizer = CLIPTokenizer(vocab=dict(ours.vocab), merges=pairs, pad_token=ours.pad_text, model_max_length=77)
    pipeline = StableDiffusionPipeline(
        model.vae, model.text_encoders["text_encoder"], tokenizer, model.backbone,
        make_scheduler(request.sampler, model.family.process, model.prediction),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.steps,
        guidance_scale=request.scale,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    return np.asarray(image)


def skip_without_its_package(sampler: str) -> None:
    needs = SAMPLERS[sampler].package
    if needs is not None and importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_what_diffusers_draws(sd1, sampler):
    skip_without_its_package(sampler)
    request = changed(REQUEST, sampler=sampler)
    image = sample(sd1, request, 7)
    assert image.size == (64, 72)
    assert np.array_equal(np.asarray(image), by_diffusers(sd1, request, 7))


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmsolver++"])
def test_v_prediction_draws_what_diffusers_draws(sd2, sampler):
    request = changed(REQUEST, sampler=sampler)
    assert np.array_equal(np.asarray(sample(sd2, request, 3)), by_diffusers(sd2, request, 3))


def far_apart(one, other) -> int:
    """The largest difference of two images in any colour of any pixel."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_is_the_same_image_in_every_batch(sd1, sampler):
    skip_without_its_package(sampler)
    prompts = ("a photo of sks dog", "a cat", "a photo of sks dog")
    requests = [changed(REQUEST, prompt=prompt, sampler=sampler) for prompt in prompts]
    together = sample_batch(sd1, requests, [7, 8, 9])
    for place, seed in ((1, 8), (2, 9)):
        assert far_apart(together[place], sample(sd1, requests[place], seed)) <= 1
    assert far_apart(together[0], together[2]) > 10  # the seeds do count


def test_requests_that_cannot_share_a_batch_are_drawn_beside_each_other_in_their_order(sd1):
    long = changed(REQUEST, prompt="dog " * 80)
    others = [changed(REQUEST, width=72), changed(REQUEST, scale=1.0), changed(REQUEST, steps=2), long]
    requests = [REQUEST, *others, REQUEST]
    together = sample_batch(sd1, requests, [1] * len(requests))
    for request, image in zip(requests, together, strict=True):
        assert far_apart(image, sample(sd1, request, 1)) <= 1


def test_a_batch_needs_a_seed_for_each_image(sd1):
    with pytest.raises(ValueError, match="2 images"):
        sample_batch(sd1, [REQUEST, REQUEST], [1])


def test_without_guidance_the_negative_prompt_counts_for_nothing(sd1):
    plain = changed(REQUEST, scale=1.0)
    image = np.asarray(sample(sd1, plain, 1))
    assert np.array_equal(image, by_diffusers(sd1, plain, 1))
    assert np.array_equal(image, np.asarray(sample(sd1, changed(plain, negative_prompt="x"), 1)))


def test_the_seed_decides_and_the_program_s_own_state_does_not(sd1):
    state = torch.get_rng_state()
    first = np.asarray(sample(sd1, REQUEST, 1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert np.array_equal(np.asarray(sample(sd1, REQUEST, 1)), first)
    assert not np.array_equal(np.asarray(sample(sd1, REQUEST, 2)), first)


def test_words_beyond_75_tokens_count_up_to_the_limit(sd1):
    long = changed(REQUEST, prompt="dog " * 80)
    longer = changed(REQUEST, prompt="dog " * 80 + "cat")
    assert not np.array_equal(np.asarray(sample(sd1, long, 1)), np.asarray(sample(sd1, longer, 1)))
    one = [np.asarray(sample(sd1, request, 1, max_chunks=1)) for request in (long, longer)]
    assert np.array_equal(*one)


def test_modules_in_training_are_left_in_training(sd1):
    sd1.backbone.train()
    sd1.backbone.conv_in.eval()
    sample(sd1, REQUEST, 1)
    assert sd1.backbone.training and not sd1.backbone.conv_in.training and not sd1.vae.training
    sd1.backbone.eval()


def test_weights_count_as_in_captions(sd1):
    """(sks:1.5) multiplies the states of its tokens by 1.5, and marks are no tokens."""
    seen = []

    def encode(texts, max_tokens):
        outputs = sd1.family.encode_text(sd1.text_encoders, sd1.tokenizer.configured(max_tokens=max_tokens)(texts))
        outputs["states"][1, 4] *= 1.5  # begin, a, photo, of, sks
        seen.append((texts, max_tokens))
        return outputs

    plain = changed(REQUEST, prompt="a photo of sks dog")
    weighted = changed(REQUEST, prompt="a photo of (sks:1.5) dog")
    expected = sample_batch(sd1, [plain], [1], encode=encode)[0]
    assert seen == [(["blurry", "a photo of sks dog"], 75)]
    assert far_apart(sample(sd1, weighted, 1), expected) <= 1
    assert far_apart(sample(sd1, weighted, 1), sample(sd1, plain, 1)) > 0


def test_clip_skip_changes_the_image(sd1):
    images = [np.asarray(sample(sd1, REQUEST, 1, settings=TextSettings(clip_skip=skip))) for skip in (None, 1, 2)]
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])


def test_a_image_that_is_no_number_in_places_is_refused(sd1):
    with torch.no_grad():
        weight = sd1.vae.decoder.conv_out.bias
        before, weight[0] = weight[0].clone(), float("nan")
        with pytest.raises(UserError, match="a photo of sks dog.*NaN"):
            sample(sd1, REQUEST, 1)
        weight[0] = before


def test_progress_is_told_in_steps_of_images(sd1):
    """4 steps of two images at once, and 2 steps of one; Heun takes each step twice, but the last."""
    told = []
    requests = [REQUEST, changed(REQUEST, prompt="a dog"), changed(REQUEST, sampler="heun", steps=2)]
    sample_batch(sd1, requests, [1, 2, 3], progress=told.append)
    assert told == [2, 2, 2, 2, 1, 1, 1]
    assert count_steps(sd1, requests) == 11


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if check_sampler(name) is None])
def test_the_counted_steps_are_those_that_are_taken(sampler, sd1, monkeypatch):
    """Whatever the U-Net says."""
    monkeypatch.setattr(sd1.backbone, "forward", lambda noisy, *_, **__: (torch.zeros_like(noisy),))
    told = []
    request = changed(REQUEST, sampler=sampler, steps=5)
    sample_batch(sd1, [request], [1], progress=told.append)
    assert sum(told) == count_steps(sd1, [request])
    refined, latents = [], torch.zeros(4, 8, 8)
    sample_batch(sd1, [request], [1], init_latents=[latents], strength=0.5, progress=refined.append)
    assert sum(refined) == count_steps(sd1, [request], 0.5) < sum(told)


def test_an_unknown_sampler_is_refused(sd1):
    with pytest.raises(UserError, match="euler_b.*"):
        sample(sd1, changed(REQUEST, sampler="euler_b"), 1)
