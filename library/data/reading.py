"""Read the pixels and the mask of a record with the same geometry."""

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
from library.data.scan.image_record import ImageRecord
from library.data.scan.mask_values import mask_source
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
        """Whether any image may have a mask; images without one are then unmasked."""
        return any(subset.mask_dir is not None or subset.shard_masks or subset.alpha_mask for subset in self.subsets)

    def settings(self, index: int) -> ImageSettings:
        """Image settings of the record's subset. With buckets there are no face crops."""
        record = self.records[index]
        settings = self.subsets[record.subset].images
        return replace(settings, face_crop=None) if self.datasets[record.dataset].buckets.enabled else settings

    def geometry(
        self, index: int, crop_rng: random.Random | None = None, flip_rng: random.Random | None = None
    ) -> Geometry:
        """Geometry of a sample of the record; without generators, that of cached latents."""
        record = self.records[index]
        return images.decide_geometry(
            self.placements[index], self.settings(index), record.name, record.size, crop_rng, flip_rng
        )

    def sizes(self, index: int, mode: CropConditioning = "exact", geometry: Geometry | None = None) -> Sizes:
        """Size conditioning of the record; the default geometry is that of cached latents."""
        return sizes_of(self.geometry(index) if geometry is None else geometry, self.records[index].size, mode)

    def score(self, index: int, of_run: float) -> float:
        """The aesthetic score of the record: its own or its subset's, else that of the run."""
        own = self.records[index].score
        return of_run if own is None else own

    def source(self, index: int) -> LatentSource:
        """Everything that cached latents of a record depend on besides its bytes and the VAE."""
        record = self.records[index]
        subset = self.subsets[record.subset]
        mask = mask_source(record, subset)
        file = None if mask is None or mask.transparency else mask.path
        return LatentSource(
            self.geometry(index), subset.images.background, file, mask is not None and mask.transparency
        )

    def pixels(self, index: int, geometry: Geometry) -> Pixels:
        """uint8 (H, W, 3). Raises UserError for an image that cannot be decoded."""
        record = self.records[index]
        background = self.subsets[record.subset].images.background
        return images.apply(images.load(record.path, record.size, background), geometry)

    def mask(self, index: int, geometry: Geometry) -> Mask | None:
        """uint8 (H, W); None for an unmasked image."""
        record = self.records[index]
        source = mask_source(record, self.subsets[record.subset])
        if source is None:
            return None
        load = masks.from_transparency if source.transparency else masks.load
        return masks.apply(load(source.path, record.size), geometry)

    def for_cache(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pixels (3, H, W) float32 in [-1, 1] and mask (H, W) float32 in [0, 1] for the cache, not augmented."""
        geometry = self.geometry(index)
        mask = self.mask(index, geometry)
        pixels = torch.from_numpy(images.to_float(self.pixels(index, geometry)))
        return pixels, None if mask is None else torch.from_numpy(masks.to_float(mask))
