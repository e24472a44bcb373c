"""The clean images that a model predicts on its way: those of a network that knows the image are the image."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from library.sampling.images import sample_batch
from library.sampling.sampling_path import Estimate, Estimates
from tests.sampling.test_refining import REQUEST, SEVERAL, SPACE, Knowing, encode, image

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def drawn(model: Any, *, estimates: Estimates | None = None, **changes: Any) -> Any:
    from dataclasses import replace

    request = replace(REQUEST, width=64, height=72, **changes)
    sample_batch(model, [request, request], [1, 2], encode=encode, estimates=estimates)
    return model.ends


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("sampler", SEVERAL)
def test_every_sampler_tells_what_the_network_knows(sampler: str, prediction: str) -> None:
    """Also early, where the latents are nearly all noise. And drawing goes on as if nobody listened, to the bit."""
    told: list[Estimate] = []
    model = Knowing(image(1), prediction)
    ends = drawn(model, estimates=Estimates(1, told.append), sampler=sampler)
    assert {each.row for each in told} == {0, 1} and len(told) == 2 * (told[0].steps - 1)
    for each in told:
        off = (each.latents[0] / SPACE.scale - image(1)).square().mean().sqrt()
        assert off < 0.03 * (1 + image(1).std()), (each.done, each.timestep, float(off))
    assert all(map(torch.equal, ends, drawn(Knowing(image(1), prediction), sampler=sampler)))


def test_they_are_told_at_every_nth_step_but_the_last() -> None:
    told: list[Estimate] = []
    drawn(Knowing(image(1)), estimates=Estimates(4, told.append), sampler="ddim")
    assert [(each.row, each.done, each.steps) for each in told] == [(0, 4, 12), (1, 4, 12), (0, 8, 12), (1, 8, 12)]
