"""Finish preview images of the base model in training with a refiner, as a user of both would."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from library.runtime.precision import torch_dtype
from library.sampling.images import sample_batch
from library.sampling.prompts import ImageRequest
from library.sampling.sampling_path import HandOver, Unfinished
from library.training.memory import release_memory
from library.training.preview.drawing import decoder
from library.training.preview.refiner_plan import RefinerPlan

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.families.family import Model
    from library.options.train_options import TrainOptions
    from library.training.inputs import LatentEncoder
    from library.training.preview.plan import PreviewPlan
    from library.training.run import Run

Finish = Callable[[Sequence[ImageRequest], Sequence[Unfinished]], list["Image"]]
"""(requests, images on their way) to images; the requests agree in size, sampler, steps and scale."""


@dataclass(frozen=True)
class Refiner:
    """A planned refiner. `loaded()` reads it and yields a function that finishes images; afterwards it is freed."""

    plan: RefinerPlan
    loaded: Callable[[], AbstractContextManager[Finish]]

    def hand_over(self) -> HandOver:
        """What keeps the images of a batch where the refiner takes over."""
        return HandOver(self.plan.below)


@contextmanager
def open_refiner(
    plan: RefinerPlan,
    open_decoder: Callable[[], AbstractContextManager[Any]],
    device: torch.device,
    *,
    mapped: bool = True,
    autocast: Callable[[], AbstractContextManager[Any]],
    release: Callable[[], None],
) -> Iterator[Finish]:
    """Load U-Net and text encoder of the refiner to `device`; see Refiner.loaded.

    `open_decoder()` has the VAE to decode with; `release` frees cached device memory. Raises CheckpointError if the
    file is gone.
    """
    try:
        with open_decoder() as vae:
            model = plan.family.load(
                plan.header, dtype=torch_dtype(plan.dtype), device=device, only=plan.modules, mapped=mapped
            )
            model = replace(model, vae=vae)

            def finish(requests: Sequence[ImageRequest], unfinished: Sequence[Unfinished]) -> list[Image]:
                return sample_batch(
                    model, requests, [0] * len(requests), unfinished=unfinished, autocast=autocast, dtype=torch.float32
                )

            try:
                yield finish
            finally:
                model.backbone, model.text_encoders = None, {}  # before their memory is released
    finally:
        release()


def build_refiner(
    options: TrainOptions, preview: PreviewPlan | None, model: Model, encoder: LatentEncoder, run: Run
) -> Refiner | None:
    """The refiner of a run, which decodes with the VAE that the run encodes images with, if it still needs one."""
    if preview is None or preview.refiner is None:
        return None
    opened = partial(
        open_refiner,
        preview.refiner,
        partial(decoder, model.vae, encoder.vae, encoder.vae_format, run.device),
        run.device,
        mapped=not options.model.disable_mmap_load_safetensors,
        autocast=run.autocast_aside,
        release=partial(release_memory, options.memory),
    )
    return Refiner(preview.refiner, opened)
