"""Options of images: folders, sizes, augmentation and loading."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from library.options.flag import flag

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area")

CropConditioning = Literal["exact", "kohya"]
"""exact: the sample's actual crop; kohya: the values that sd-scripts calculates."""


@dataclass(frozen=True)
class DatasetOptions:
    """Folders, dataset files, buckets, augmentation and data loading."""

    train_data_dir: Path | str | None = flag(
        None,
        "Folder of the training folders, each named <repeats>_<identifier> <class>, for example 10_sks dog; with "
        "class_tokens, a plain folder of images. May be an fsspec URL such as s3://bucket/folder.",
        may_change_on_resume=True,
    )
    reg_data_dir: Path | str | None = flag(
        None,
        "Folder or URL of the regularisation folders, each named <repeats>_<class>, for example 1_dog.",
        may_change_on_resume=True,
    )
    dataset_config: Path | None = flag(
        None,
        "Dataset file (.toml or .json) with datasets and subsets; replaces train_data_dir.",
        may_change_on_resume=True,
    )
    data_backend_config: Path | None = flag(
        None,
        "SimpleTuner's multidatabackend.json, read by SimpleTuner's rules; replaces train_data_dir.",
        may_change_on_resume=True,
    )
    in_json: Path | None = flag(
        None,
        "Metadata file (.json or .jsonl) with captions and tags of the images in train_data_dir.",
        may_change_on_resume=True,
    )
    dataset_repeats: int = flag(
        1,
        "Repeats of each image of in_json or dataset_config in an epoch.",
        at_least=1,
        zero_is_off=True,
        may_change_on_resume=True,
    )
    class_tokens: str | None = flag(
        None,
        "Treat train_data_dir as a plain folder of images and use this caption, for example sks dog, for images "
        "without one; the folder's name has no meaning then.",
        may_change_on_resume=True,
    )
    num_repeats: int = flag(
        1,
        "With class_tokens: repeats of each image in an epoch.",
        at_least=1,
        zero_is_off=True,
        may_change_on_resume=True,
    )
    data_cache_dir: Path | None = flag(
        None,
        "Folder for cached image sizes and captions, and for copies of remote images.",
        may_change_on_resume=True,
    )
    shard_buffer: int = flag(
        0,
        "Shards that are read at a time: an epoch goes through the shuffled shards in groups of this size, and remote "
        "ones are copied as a whole; 0 = images of all shards in any order.",
        at_least=0,
    )
    resolution: tuple[int, int] | None = flag(
        None,
        "Training resolution in pixels: 512 for a square, or width,height such as 512,768.",
        metadata="ss_resolution",
        per_dataset=True,
    )
    train_batch_size: int = flag(
        1,
        "Images per batch on each device.",
        at_least=1,
        metadata="ss_batch_size_per_device",
        per_dataset=True,
    )
    enable_bucket: bool = flag(
        False,
        "Sort images by aspect ratio into buckets of about the training resolution's area, instead of cropping all"
        " to one size.",
        metadata="ss_enable_bucket",
        per_dataset=True,
    )
    bucket_no_upscale: bool = flag(
        False,
        "Never upscale an image: a small one gets a bucket of its own size, and min_bucket_reso and "
        "max_bucket_reso have no effect.",
        metadata="ss_bucket_no_upscale",
        per_dataset=True,
    )
    min_bucket_reso: int = flag(
        256, "Shortest side of a bucket in pixels.", at_least=64, metadata="ss_min_bucket_reso", per_dataset=True
    )
    max_bucket_reso: int = flag(
        1024, "Longest side of a bucket in pixels.", at_least=64, metadata="ss_max_bucket_reso", per_dataset=True
    )
    bucket_reso_steps: int = flag(
        64,
        "Bucket sides are multiples of this number of pixels, which is rounded up to a multiple of 8.",
        at_least=1,
    )
    resize_interpolation: str | None = flag(
        None,
        "Interpolation for resizing images; not set = area to shrink, Lanczos to enlarge.",
        choices=INTERPOLATIONS,
        metadata="ss_resize_interpolation",
    )
    max_image_memory: float = flag(
        2.0,
        "Memory in GiB that a decoded image may need, at 4 bytes per pixel; larger images are left out. 2 = 536"
        " megapixels.",
        above=0,
        may_change_on_resume=True,
    )
    alpha_color: str = flag("#ffffff", "Background colour of transparent images, as #rrggbb.")
    color_aug: bool = flag(
        False,
        "Vary hue or brightness of the images slightly; not with cached latents.",
        metadata="ss_color_aug",
        per_dataset=True,
    )
    flip_aug: bool = flag(
        False, "Mirror images left to right at random, half of the time.", metadata="ss_flip_aug", per_dataset=True
    )
    random_crop: bool = flag(
        False,
        "Crop at a random position instead of the centre; not with cached latents.",
        metadata="ss_random_crop",
        per_dataset=True,
    )
    face_crop_aug_range: tuple[float, float] | None = flag(
        None,
        "Crop around the face given in the file name (..._cx_cy_w_h), with a random crop size between these "
        "multiples of the face size, for example 2.0,4.0; not with buckets or cached latents.",
        metadata="ss_face_crop_aug_range",
    )
    crop_conditioning: CropConditioning = flag(
        "exact",
        "Crop coordinates given to Stable Diffusion XL: exact = those of the actual crop, kohya = as sd-scripts "
        "calculates them, which fit an image with borders.",
        choices=get_args(CropConditioning),
        needs="size_conditioning",
    )
    data_aesthetic_score: float = flag(
        7.0,
        "Aesthetic score of the images, 0 to 10, for the refiner of Stable Diffusion XL; an image's own score "
        "overrides it.",
        needs="aesthetic_score",
    )
    max_data_loader_n_workers: int = flag(
        8,
        "Worker processes that prepare images; 0 = a thread of the training process.",
        at_least=0,
        may_change_on_resume=True,
    )
    debug_dataset: bool = flag(
        False,
        "Write an HTML page that shows the images and captions as the model would see them, and stop.",
        may_change_on_resume=True,
    )
