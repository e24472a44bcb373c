"""Refining: a network that knows the image is brought to it by every sampler, from wherever the steps begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from library.families.clip.text_inputs import ClipTokenizers
from library.families.clip.tokenizer import shipped_tokenizer
from library.families.family import LatentSpace
from library.objective.process import VariancePreserving
from library.options.mistakes import UserError
from library.sampling.images import sample_batch
from library.sampling.prompts import ImageRequest
from library.sampling.samplers import SAMPLERS, make_scheduler, start_below
from library.sampling.sampling_path import HandOver
from tests.sampling.test_samplers import AVAILABLE

# diffusers' and numpy's remarks about their own future
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

PROCESS = VariancePreserving.scaled_linear()
SPACE = LatentSpace(channels=4, stride=8, scale=0.5, cache_suffix="_x.npz")
SEVERAL = [name for name in AVAILABLE if not name.startswith("k_")]  # those are the same by another name
REQUEST = ImageRequest("a dog", width=512, height=512, steps=12, scale=1.0)


def image(seed: int, size: tuple[int, int] = (9, 8)) -> Tensor:
    """Latents of some image, not scaled."""
    return 2 * torch.randn(4, *size, generator=torch.Generator().manual_seed(seed))


def sigma(timestep: float) -> float:
    """Noise by signal of the published process, sqrt((1 - abar) / abar), between whole timesteps in its logarithm."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = np.cumprod(1 - betas)
    return float(np.exp(np.interp(timestep, np.arange(1000), np.log(np.sqrt((1 - alphas) / alphas)))))


class Knowing:
    """A model whose network knows the image behind the noise: `target` (C, h, w), not scaled."""

    def __init__(self, target: Tensor, prediction: str = "epsilon") -> None:
        self.target, self.prediction = target * SPACE.scale, prediction
        self.zero_terminal_snr = False
        self.backbone = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
        self.vae, self.text_encoders = None, {}
        self.tokenizer = ClipTokenizers({"text_encoder": shipped_tokenizer(49407)})
        self.asked: list[float] = []
        self.given: list[Any] = []
        self.noise: list[Tensor] = []
        self.ends: list[Tensor] = []
        self.family = SimpleNamespace(latent=SPACE, process=PROCESS, predict=self.predict, decode_latents=self.decode)

    def modules(self) -> dict[str, Any]:
        return {}

    def predict(self, backbone: Any, noisy: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        """Of x = a x0 + b eps: eps, or v = a eps - b x0."""
        self.asked.append(float(timesteps[0]))
        self.given.append(conditioning)
        ratio = sigma(self.asked[-1])
        signal, noise = 1 / (1 + ratio**2) ** 0.5, ratio / (1 + ratio**2) ** 0.5
        eps = (noisy - signal * self.target) / noise
        self.noise.append(eps[0])
        return eps if self.prediction == "epsilon" else signal * eps - noise * self.target

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        self.ends.append(latents[0])
        return torch.zeros(1, 3, latents.shape[-2] * 8, latents.shape[-1] * 8)


def refine(model: Any, starts: list[Tensor], strength: float, **changes: Any) -> list[Any]:
    requests = [replace(REQUEST, **changes)] * len(starts)
    return sample_batch(
        model, requests, list(range(len(starts))), init_latents=starts, strength=strength, encode=encode
    )


def encode(texts: Sequence[str], max_tokens: int) -> dict[str, Tensor]:
    return {"states": torch.zeros(len(texts), 77, 8)}


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("sampler", SEVERAL)
def test_every_sampler_ends_at_the_image_that_the_network_knows(sampler: str, prediction: str) -> None:
    """x0, or where a sampler ends at timestep 0 what of the first noise is left there: a x0 + b eps."""
    for strength in (0.2, 0.53, 1.0):
        model = Knowing(image(1), prediction)
        (drawn,) = refine(model, [image(2)], strength, sampler=sampler)
        assert drawn.size == (64, 72)
        left = 1 / (1 + sigma(0) ** 2) ** 0.5
        at_first = left * image(1) + (1 - left**2) ** 0.5 * model.noise[0] / SPACE.scale
        apart = [float((model.ends[0] - each).square().mean().sqrt()) for each in (image(1), at_first)]
        assert min(apart) < 0.03
        assert max(model.asked) < 1000 * strength


@pytest.mark.parametrize("sampler", SEVERAL)
def test_the_steps_are_those_of_drawing_that_lie_in_the_share(sampler: str) -> None:
    scheduler = make_scheduler(sampler, PROCESS, "epsilon")
    scheduler.set_timesteps(12)
    every = sorted({float(timestep) for timestep in scheduler.timesteps})
    model = Knowing(image(1))
    refine(model, [image(2)], 0.5, sampler=sampler)
    between = 1 if scheduler.order == 2 else 0  # the first half of a step of second order may lie beyond
    asked = [timestep for timestep in every if timestep < 500]
    assert sorted(set(model.asked)) in [asked[: len(asked) - cut] for cut in range(between + 1)]


def test_a_refined_image_is_as_noisy_at_first_as_the_process_says() -> None:
    """x = sqrt(abar) x0 + sqrt(1 - abar) eps, at timestep 199 of 30 steps (1 + 33 * 6) for a strength of 0.2."""
    seen: list[Tensor] = []

    class Watching(Knowing):
        def predict(self, backbone: Any, noisy: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
            seen.append(noisy)
            return super().predict(backbone, noisy, timesteps, conditioning)

    model = Watching(image(1))
    refine(model, [image(2)], 0.2, steps=30)
    noise = torch.randn(1, 4, 9, 8, generator=torch.Generator().manual_seed(0))[0]
    signal = 1 / (1 + sigma(199) ** 2) ** 0.5
    assert model.asked == [199.0, 166.0, 133.0, 100.0, 67.0, 34.0, 1.0]
    expected = signal * image(2) * SPACE.scale + (1 - signal**2) ** 0.5 * noise
    assert torch.allclose(seen[0][0], expected, atol=1e-4)


def test_images_of_different_sizes_are_refined_in_their_order() -> None:
    model = Knowing(torch.zeros(4, 1, 1))
    sizes = [(8, 8), (9, 8), (8, 8)]
    drawn = refine(model, [image(number, size) for number, size in enumerate(sizes)], 0.2)
    assert [each.size for each in drawn] == [(64, 64), (64, 72), (64, 64)]
    told = [given["sizes"].tolist() for given in model.given]
    assert told[0] == [[64, 64, 0, 0, 64, 64]] * 2 and told[-1] == [[72, 64, 0, 0, 72, 64]]


def test_a_process_that_ends_in_noise_alone_leaves_nothing_of_the_start() -> None:
    """At strength 1 and zero terminal SNR the first latents are the noise itself, whatever is refined."""
    ends = []
    for start in (image(2), image(3), None):
        model = Knowing(image(1), "v")
        model.zero_terminal_snr = True
        request = ImageRequest("a dog", width=64, height=72, steps=1, scale=1.0)
        sample_batch(model, [request], [5], init_latents=None if start is None else [start], encode=encode)
        ends.append(model.ends[0])
    assert torch.allclose(ends[0], ends[2], atol=1e-3) and torch.allclose(ends[1], ends[2], atol=1e-3)


MEMORYLESS = ("ddim", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a")


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("sampler", SEVERAL)
def test_a_model_that_takes_over_from_itself_goes_where_it_would_have_gone(sampler: str, prediction: str) -> None:
    """The very latents where a step knows nothing of those before it; random numbers go on too."""
    model, requests = Knowing(image(1), prediction), [replace(REQUEST, width=64, height=72, sampler=sampler)] * 2
    model.zero_terminal_snr = prediction == "v"
    hand_over = HandOver(200)
    sample_batch(model, requests, [3, 4], encode=encode, hand_over=hand_over)
    whole, asked = model.ends.copy(), model.asked.copy()
    model.ends.clear()
    model.asked.clear()
    sample_batch(model, requests, [3, 4], encode=encode, unfinished=[hand_over.kept[0], hand_over.kept[1]])
    if sampler != "pndm":  # it asks for its first step again
        assert model.asked and model.asked == asked[-len(model.asked) :]
    for one, other in zip(whole, model.ends, strict=True):
        assert torch.equal(one, other) if sampler in MEMORYLESS else torch.allclose(one, other, atol=0.05)


def test_nothing_is_handed_over_where_no_step_is_left() -> None:
    hand_over = HandOver(50)
    request = replace(REQUEST, width=64, height=72, steps=4, sampler="dpmsolver++")
    sample_batch(Knowing(image(1)), [request], [3], encode=encode, hand_over=hand_over)
    assert not hand_over.kept


def test_too_few_steps_are_told() -> None:
    with pytest.raises(UserError, match="dpmsolver.*below timestep 200") as caught:
        refine(Knowing(image(1)), [image(2)], 0.2, sampler="dpmsolver++", steps=4)
    assert "6 or more" in str(caught.value)
    refine(Knowing(image(1)), [image(2)], 0.2, sampler="dpmsolver++", steps=6)


def test_as_many_starts_as_requests() -> None:
    with pytest.raises(ValueError, match="2 images"):
        sample_batch(Knowing(image(1)), [REQUEST, REQUEST], [1, 2], init_latents=[image(2)])
    with pytest.raises(ValueError, match="2 images"):
        sample_batch(Knowing(image(1)), [REQUEST, REQUEST], [1, 2], unfinished=[])


def test_the_corrected_first_step_asks_at_the_second_timestep_twice() -> None:
    scheduler = make_scheduler("pndm", PROCESS, "epsilon")
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist()[:4] == [901, 801, 801, 701]
    for end, expected in ((1000, [901, 801, 801, 701]), (850, [801, 701, 701, 601]), (100, [1])):
        assert start_below("pndm", scheduler, end).tolist()[:4] == expected
    assert [name for name, each in SAMPLERS.items() if each.corrected] == ["pndm"]
