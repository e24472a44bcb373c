"""From a record to what a sample shows: pixels and mask, through one geometry."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from library.data import images, masks
from library.data.buckets import Placement
from library.data.cache.latent_entries import LatentSource
from library.data.images import Geometry
from library.data.scan.scan import ImageRecord
from library.data.size_conditioning import Sizes, sizes_of
from library.options.datasets import DatasetSpec, ImageSettings, SubsetSpec

if TYPE_CHECKING:
    from library.data.images import Pixels
    from library.data.masks import Mask
    from library.options.groups.dataset import CropConditioning


@dataclass(frozen=True)
class ImageReader:
    """Reads the images of a run. Picklable; `placements` are per record, `subsets` and `datasets` those of a scan."""

    records: Sequence[ImageRecord]
    placements: Sequence[Placement]
    subsets: Sequence[SubsetSpec]
    datasets: Sequence[DatasetSpec]

    @property
    def has_masks(self) -> bool:
        """Whether any image may have one: the others then count fully."""
        return any(subset.mask_dir is not None or subset.alpha_mask for subset in self.subsets)

    def settings(self, index: int) -> ImageSettings:
        """What happens to the images of this record's subset. Buckets leave no room for crops around faces."""
        record = self.records[index]
        chosen = self.subsets[record.subset].images
        return replace(chosen, face_crop=None) if self.datasets[record.dataset].buckets.enabled else chosen

    def geometry(
        self, index: int, crop_rng: random.Random | None = None, flip_rng: random.Random | None = None
    ) -> Geometry:
        """What a sample of the record shows; without generators what a cache holds."""
        record = self.records[index]
        return images.geometry(
            self.placements[index], self.settings(index), record.name, record.size, crop_rng, flip_rng
        )

    def sizes(self, index: int, mode: CropConditioning = "exact", shown: Geometry | None = None) -> Sizes:
        """What a model is told of the record's size and crop; without `shown` as a cache holds it, nothing left to
        chance."""
        return sizes_of(self.geometry(index) if shown is None else shown, self.records[index].size, mode)

    def score(self, index: int, of_run: float) -> float:
        """The aesthetic score that a model is told of the record: its own or its subset's, else that of the run."""
        own = self.records[index].score
        return of_run if own is None else own

    def source(self, index: int) -> LatentSource:
        """All that the cached latents of a record depend on besides its bytes and the VAE."""
        record = self.records[index]
        subset = self.subsets[record.subset]
        folder = subset.mask_folder
        mask = None if record.mask is None or folder is None else folder / record.mask
        alpha = subset.alpha_mask and record.transparent and mask is None
        return LatentSource(self.geometry(index), subset.images.background, mask, alpha)

    def pixels(self, index: int, shown: Geometry) -> Pixels:
        """uint8 (H, W, 3). Raises UserError for an image that cannot be decoded."""
        record = self.records[index]
        background = self.subsets[record.subset].images.background
        return images.apply(images.load(record.path, record.size, background), shown)

    def mask(self, index: int, shown: Geometry) -> Mask | None:
        """uint8 (H, W); None where the image has none and counts fully. A mask file beats transparency."""
        record = self.records[index]
        subset = self.subsets[record.subset]
        folder = subset.mask_folder
        if record.mask is not None and folder is not None:
            return masks.apply(masks.load(folder / record.mask, record.size), shown)
        if subset.alpha_mask and record.transparent:
            return masks.apply(masks.of_alpha(record.path, record.size), shown)
        return None

    def for_cache(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pixels (3, H, W) float32 in [-1, 1] and mask (H, W) float32 in [0, 1], nothing left to chance."""
        shown = self.geometry(index)
        mask = self.mask(index, shown)
        pixels = torch.from_numpy(images.to_float(self.pixels(index, shown)))
        return pixels, None if mask is None else torch.from_numpy(masks.to_float(mask))
