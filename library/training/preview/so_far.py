"""Pictures of a preview image while it is drawn: the clean image that the model predicts so far.

They are made aside: neither the image that is drawn nor the training changes by a bit. One that fails is said once,
and that drawing goes on without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.sampling.images import to_image
from library.sampling.latent_rgb import LatentRgb, fit_latent_rgb
from library.sampling.sampling_path import Estimate
from library.sampling.tiny_autoencoder import decode_tiny, load_tiny
from library.sampling.write_image import write_image
from library.training.preview.so_far_plan import FOLDER, SoFarPlan
from library.training.run import DrawnImage

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.data.dataset import TrainingDataset
    from library.families.family import Family
    from library.sampling.prompts import ImageRequest
    from library.training.inputs import LatentEncoder
    from library.training.preview.plan import PreviewPlan
    from library.training.run import Run

FITTED = 4  # images that a linear map is fitted to


@dataclass
class SoFarDecoder:
    """Decodes what a model predicts on its way. `samples()`: latents (C, h, w), unscaled, of some training images, for
    the linear map. The tiny autoencoder is read, or the map fitted, for the first picture, and kept."""

    plan: SoFarPlan
    family: Family
    device: torch.device
    samples: Callable[[], Sequence[Tensor]]
    say: Callable[[str], None]
    _map: LatentRgb | None = field(default=None, init=False)

    def image(self, vae: Any, latents: Tensor) -> Image:
        """The picture of latents (1, C, h, w) as the backbone sees them; `vae` decodes the final image."""
        if self.plan.decoder == "tae":
            return to_image(decode_tiny(self._tiny, latents)[0])
        unscaled = self.family.latent.unscaled(latents)
        if self.plan.decoder == "vae":
            return to_image(self.family.decode_latents(vae, unscaled)[0])
        stride = self.family.latent.stride
        small = to_image(self._linear(vae).colours(unscaled[0]))
        return small.resize((small.width * stride, small.height * stride))

    @cached_property
    def _tiny(self) -> Any:
        assert self.plan.tae is not None
        return load_tiny(self.plan.tae).to(self.device)

    def _linear(self, vae: Any) -> LatentRgb:
        if self._map is None:
            samples = self.samples()
            pixels = (self.family.decode_latents(vae, each[None].to(vae.device))[0] for each in samples)
            self._map = fit_latent_rgb(zip(samples, pixels, strict=True))
            off = f"{self._map.error:.1%} of the brightness on average"
            self.say(f"pictures while drawing: a linear map from latents to colours, fitted to the VAE, off by {off}")
        return self._map


@dataclass
class SoFar:
    """Makes the pictures of a run. `log_images`: see Run."""

    plan: SoFarPlan
    decoder: SoFarDecoder
    log_images: Callable[..., None]
    warn: Callable[[str], None]
    _failed_in: str | None = field(default=None, init=False)  # the drawing that goes on without

    def of(
        self,
        preview: PreviewPlan,
        mark: str,
        suffix: str,
        requests: Mapping[int, ImageRequest],
        step: int,
        time: datetime,
    ) -> GroupSoFar:
        """The pictures of a group of prompts, drawn by their places with these seeds after `step` steps; see
        PreviewPlan.path."""
        return GroupSoFar(self, preview, mark, suffix, requests, step, time)

    def show(self, group: GroupSoFar, estimate: Estimate, vae: Any) -> None:
        """Make a picture, write it and tell of it."""
        if self._failed_in == group.mark:
            return
        try:
            drawn = group.drawn(estimate, self.decoder.image(vae, estimate.latents))
            write_image(drawn.path, drawn.request, drawn.image)
            named = {group.name(estimate): drawn}
            self.log_images(named, group.step, to_trackers="tensorboard" in self.plan.targets)
        except Exception as error:  # noqa: BLE001 - a damaged file, out of memory, full disk
            if self._failed_in is None:
                self.warn(f"no pictures while drawing: {type(error).__name__}: {error}")
            self._failed_in = group.mark


@dataclass(frozen=True)
class GroupSoFar:
    """The pictures of prompts that are drawn together."""

    so_far: SoFar
    preview: PreviewPlan
    mark: str
    suffix: str
    requests: Mapping[int, ImageRequest]
    step: int
    time: datetime

    @property
    def every(self) -> int:
        """See SoFarPlan."""
        return self.so_far.plan.every

    def show(self, vae: Any, estimate: Estimate) -> None:
        """Make the picture of an estimate, which `vae` can decode."""
        self.so_far.show(self, estimate, vae)

    def name(self, estimate: Estimate) -> str:
        """Its name for trackers: "so_far/00/05"."""
        place = list(self.requests)[estimate.row]
        return f"so_far/{place:02d}{self.suffix}/{estimate.done:02d}"

    def drawn(self, estimate: Estimate, image: Image) -> DrawnImage:
        """The picture with its file, `so_far/NAME_000012_00_20260131235959_05of20.png`, and what its event says."""
        place = list(self.requests)[estimate.row]
        request = self.requests[place]
        final = self.preview.path(self.mark, place, self.time, request.seed, self.suffix)
        path = final.parent / FOLDER / f"{final.stem}_{estimate.done:02d}of{estimate.steps:02d}.png"
        about = {
            "step_label": f"{estimate.done}/{estimate.steps}",
            "timestep": estimate.timestep,
            "severity": "info" if "webhook" in self.so_far.plan.targets else "debug",
        }
        return DrawnImage(image, replace(request, steps=estimate.steps), path, about)


def build_so_far(
    preview: PreviewPlan | None, family: Family, dataset: TrainingDataset, encoder: LatentEncoder, run: Run
) -> SoFar | None:
    """The pictures of a run."""
    if preview is None or preview.so_far is None:
        return None
    samples = partial(some_latents, dataset, encoder)
    decoder = SoFarDecoder(preview.so_far, family, run.device, samples, run.say)
    return SoFar(preview.so_far, decoder, run.log_images, run.warn)


def some_latents(dataset: TrainingDataset, encoder: LatentEncoder) -> list[Tensor]:
    """Latents of a few training images, spread over all, from the cache or encoded now."""
    count = len(dataset.images.records)
    numbers = list(range(0, count, max(1, count // FITTED)))[:FITTED]
    store = dataset.latents
    if store is not None:
        return [store.get(number, False).latents for number in numbers]
    return [image.latents for image in encoder.encode_some(dataset.images, numbers, progress=False)]
