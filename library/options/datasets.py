"""Records of the datasets and subsets of a run, the same for every source.

kohya's folder names, kohya's dataset file and SimpleTuner's data backend file are all read into these records. A
dataset has one resolution and one batch size; a subset is one folder with its settings for images and captions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from library.messages import without_secrets
from library.options.mistakes import Mistake

Size = tuple[int, int]  # width, height
Place = Path | str  # a folder, or its URL as the user wrote it

BucketRule = Literal["kohya", "area", "shorter_edge"]
"""How an image's bucket is chosen: from kohya's list; or with the image's own aspect ratio, at the resolution's area or
with the resolution's width as the shorter edge, both rounded to the step (SimpleTuner's resolution_type)."""

Crop = Literal["centre", "random", "corner"]
CaptionSource = Literal["files", "metadata", "class_tokens", "file_name"]


@dataclass(frozen=True)
class BucketSettings:
    """Settings of buckets; lengths in pixels. Without `enabled` the resolution is the only bucket."""

    resolution: Size
    enabled: bool = False
    no_upscale: bool = False
    smallest: int = 256
    largest: int = 1024
    step: int = 64
    rule: BucketRule = "kohya"
    shrink_to: float | None = None  # before the crop, resize to this area (rule shorter_edge: to this shorter edge)


@dataclass(frozen=True)
class CaptionSettings:
    """How a caption is changed for each sample; terms as in kohya's sd-scripts."""

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
    warmup_min: int = 1  # number of tags at the start
    warmup_step: float = 0.0  # optimizer steps until all tags are used; below 1 a share of the run; 0 = off


@dataclass(frozen=True)
class ImageSettings:
    """How an image is changed for each sample."""

    random_crop: bool = False
    flip: bool = False
    colour: bool = False
    corner_crop: bool = False  # from the top left instead of the centre
    # range of the crop's shorter side in face sizes; kohya: only without buckets, usually 2.0 to 4.0
    face_crop: tuple[float, float] | None = None
    interpolation: str | None = (
        None  # lanczos nearest bilinear linear bicubic cubic area box; None: area to shrink, Lanczos to enlarge
    )
    background: tuple[int, int, int] = (255, 255, 255)  # RGB behind transparent pixels


@dataclass(frozen=True)
class SubsetSpec:
    """One folder of images, the images listed in a metadata file, or those in shards."""

    image_dir: Place | None  # None: the metadata file has absolute paths
    origin: str  # where the user set it: "data.toml, line 12", "--train_data_dir"
    repeats: int = 1  # 1 = once
    is_reg: bool = False
    validation: bool = False  # only validated on; with is_reg: images of the class
    class_tokens: str | None = None  # caption of images without one
    caption_source: CaptionSource = "files"
    caption_extensions: tuple[str, ...] = (".caption",)  # the first existing one is used
    caption_encoding: str = "utf-8"
    metadata_file: Path | None = None
    recursive: bool = False
    shards: str | None = None  # tar archives in place of a folder: a pattern of their names, or their folder or URL
    shard_table: Place | None = None  # None: beside the shards
    shard_masks: bool = False  # decided by the scan: masks in the shards are used
    shard_copies: int = 0  # whole copies of remote shards that may be on the disk
    mask_dir: Place | None = None  # masks named like their images, any extension
    alpha_mask: bool = False  # use the image's transparency as its mask
    least_edge: int = 0  # images with a smaller shorter side are skipped
    least_area: int = 0  # images with fewer pixels are skipped
    score: float | None = None  # aesthetic score, 0 to 10, of images without one; None: the run's
    captions: CaptionSettings = field(default_factory=CaptionSettings)
    images: ImageSettings = field(default_factory=ImageSettings)

    @property
    def source(self) -> str:
        """What names the subset: its folder, metadata file or shards, without the password of a URL."""
        return without_secrets(str(self.image_dir or self.metadata_file or self.shards or ""))

    @property
    def image_folder(self) -> Path | None:
        """`image_dir` on this machine. Raises ValueError for a URL (dataset_specs.describe replaces it by its copy)."""
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
    """The datasets of a run, with notes and mistakes about their description."""

    datasets: tuple[DatasetSpec, ...] = ()
    notes: tuple[str, ...] = ()
    mistakes: tuple[Mistake, ...] = ()
