"""What a run is to train on, decided: datasets of subsets, the same records whoever described them.

The folder convention, kohya's dataset file and SimpleTuner's data backend file all end here; nothing later asks which
of them it was. One dataset has one resolution and one batch size; a subset is one folder and what happens to its
images and captions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from library.options.mistakes import Mistake

Size = tuple[int, int]  # width, height
Place = Path | str  # a folder, or the URL of one as the user gave it

BucketRule = Literal["kohya", "area", "shorter_edge"]
"""How an image's bucket is found: from kohya's list; or with the image's own aspect at the resolution's area, or at
a shorter edge of the resolution's width, both rounded to the step (SimpleTuner's resolution_type)."""

Crop = Literal["centre", "random", "corner"]
CaptionSource = Literal["files", "metadata", "class_tokens", "file_name"]


@dataclass(frozen=True)
class BucketSettings:
    """What decides the bucket of an image. Lengths in pixels. `enabled` off: one bucket, the resolution."""

    resolution: Size
    enabled: bool = False
    no_upscale: bool = False
    smallest: int = 256
    largest: int = 1024
    step: int = 64
    rule: BucketRule = "kohya"
    shrink_to: float | None = None  # before the crop, scale to this area (rule shorter_edge: to this shorter edge)


@dataclass(frozen=True)
class CaptionSettings:
    """What happens to a caption each time a sample is made; words as in kohya's sd-scripts."""

    shuffle: bool = False
    keep_tokens: int = 0
    dropout_rate: float = 0.0
    dropout_every_n_epochs: int = 0  # 0 = never
    prefix: str = ""
    suffix: str = ""
    separator: str = ","
    secondary_separator: str = ""
    keep_tokens_separator: str = ""
    wildcard: bool = False
    tag_dropout_rate: float = 0.0
    warmup_min: int = 1  # tags that are there from the beginning
    warmup_step: float = 0.0  # optimiser steps until all tags are there; below 1 a share of the run; 0 = no warm-up


@dataclass(frozen=True)
class ImageSettings:
    """What happens to an image each time a sample is made."""

    random_crop: bool = False
    flip: bool = False
    colour: bool = False
    corner_crop: bool = False  # from the top left instead of the centre
    # as many face sizes go into the crop's shorter side, from and to; kohya: only without buckets, 2.0 to 4.0 is usual
    face_crop: tuple[float, float] | None = None
    interpolation: str | None = None  # lanczos nearest bilinear linear bicubic cubic area box; None: by need
    background: tuple[int, int, int] = (255, 255, 255)  # what transparency is laid on, RGB


@dataclass(frozen=True)
class SubsetSpec:
    """One folder of images, or the images that a metadata file lists."""

    image_dir: Place | None  # None: the metadata file gives absolute paths
    origin: str  # where the user said so: "data.toml, line 12", "--train_data_dir"
    repeats: int = 1  # 1 = once
    is_reg: bool = False
    class_tokens: str | None = None  # the caption of images without one of their own
    caption_source: CaptionSource = "files"
    caption_extensions: tuple[str, ...] = (".caption",)  # the first one that is there counts
    caption_encoding: str = "utf-8"
    metadata_file: Path | None = None
    recursive: bool = False
    mask_dir: Place | None = None  # masks under the images' names, any ending
    alpha_mask: bool = False  # the image's own transparency is its mask
    least_edge: int = 0  # images with a shorter side below it are left out
    least_area: int = 0  # images with fewer pixels are left out
    score: float | None = None  # aesthetic score, 0 to 10, of images without one of their own; None: the run's
    captions: CaptionSettings = field(default_factory=CaptionSettings)
    images: ImageSettings = field(default_factory=ImageSettings)

    @property
    def image_folder(self) -> Path | None:
        """`image_dir` on this machine. Raises ValueError for a URL, whose copy dataset_specs.describe puts in place."""
        return _on_this_machine(self.image_dir)

    @property
    def mask_folder(self) -> Path | None:
        """`mask_dir` on this machine. Raises ValueError as `image_folder` does."""
        return _on_this_machine(self.mask_dir)


def _on_this_machine(place: Place | None) -> Path | None:
    if isinstance(place, str):
        raise ValueError(f"{place} has no local copy yet")
    return place


@dataclass(frozen=True)
class DatasetSpec:
    """Subsets that share a resolution and a batch size."""

    origin: str
    buckets: BucketSettings
    subsets: tuple[SubsetSpec, ...]
    batch_size: int = 1
    validation_split: float = 0.0
    validation_seed: int | None = None


@dataclass(frozen=True)
class ParsedDatasets:
    """The datasets of a run as the user described them, what to tell about that, and what has to be mended."""

    datasets: tuple[DatasetSpec, ...] = ()
    notes: tuple[str, ...] = ()
    mistakes: tuple[Mistake, ...] = ()
