"""Draw images of the example world with a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from examples.shapes.world import SIDE, Pixels
from library.checkpoints.files import read_header
from library.families.family import Model
from library.families.registry import load_model
from library.sampling.images import sample_batch
from library.sampling.prompts import ImageRequest

STEPS, SCALE, SAMPLER = 20, 4.0, "ddim"
BATCH = 32


def open_model(path: Path) -> Model:
    """The model of a file, float32, on the CPU."""
    return load_model(read_header(path))


def draw(model: Model, prompts: Sequence[str], seeds: Sequence[int]) -> list[Pixels]:
    """One image for each prompt and seed."""
    images: list[Pixels] = []
    for start in range(0, len(prompts), BATCH):
        requests = [
            ImageRequest(prompt, width=SIDE, height=SIDE, steps=STEPS, scale=SCALE, sampler=SAMPLER)
            for prompt in prompts[start : start + BATCH]
        ]
        drawn = sample_batch(model, requests, seeds[start : start + BATCH])
        images += [np.asarray(image) for image in drawn]
    return images
