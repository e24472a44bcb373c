"""Where the images are, at what size they are trained, and what is done to them on their way to the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from library.options.flag import flag

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area")

CropConditioning = Literal["exact", "kohya"]
"""exact: the crop that the sample shows; kohya: the numbers that sd-scripts gives."""


@dataclass(frozen=True)
class DatasetOptions:
    """Folders, files, buckets, augmentation and the processes that prepare images."""

    train_data_dir: Path | str | None = flag(
        None,
        "Folder with the training folders, each named <repeats>_<identifier> <class>, for example 10_sks dog; or, with "
        "class_tokens, a folder of images; or an fsspec URL such as s3://bucket/folder.",
        may_change_on_resume=True,
    )
    reg_data_dir: Path | str | None = flag(
        None,
        "Folder with the regularisation folders, each named <repeats>_<class>, for example 1_dog; or its URL.",
        may_change_on_resume=True,
    )
    dataset_config: Path | None = flag(
        None,
        "File (.toml or .json) that describes datasets and subsets; it takes the place of train_data_dir.",
        may_change_on_resume=True,
    )
    data_backend_config: Path | None = flag(
        None,
        "SimpleTuner's multidatabackend.json, read by its own rules; it takes the place of train_data_dir.",
        may_change_on_resume=True,
    )
    in_json: Path | None = flag(
        None,
        "Metadata file (.json or .jsonl) with captions and tags of the images in train_data_dir.",
        may_change_on_resume=True,
    )
    dataset_repeats: int = flag(
        1, "How often an epoch shows each image of in_json.", at_least=1, zero_is_off=True, may_change_on_resume=True
    )
    class_tokens: str | None = flag(
        None,
        "For a plain folder of images: the caption of images without one, for example sks dog. The folder's name "
        "then says nothing.",
        may_change_on_resume=True,
    )
    num_repeats: int = flag(
        1,
        "With class_tokens: how often an epoch shows each image.",
        at_least=1,
        zero_is_off=True,
        may_change_on_resume=True,
    )
    data_cache_dir: Path | None = flag(
        None,
        "Folder for what is remembered about the images (sizes, captions) and for copies of remote ones.",
        may_change_on_resume=True,
    )
    resolution: tuple[int, int] | None = flag(
        None,
        "Training resolution: 512 for a square, or width,height such as 512,768.",
        metadata="ss_resolution",
        per_dataset=True,
    )
    train_batch_size: int = flag(
        1,
        "Images in one batch of one device.",
        at_least=1,
        metadata="ss_batch_size_per_device",
        per_dataset=True,
    )
    enable_bucket: bool = flag(
        False,
        "Sort images of different shapes into buckets of about the training resolution's area instead of "
        "cropping all to one shape.",
        metadata="ss_enable_bucket",
        per_dataset=True,
    )
    bucket_no_upscale: bool = flag(
        False,
        "Never enlarge an image: a small one gets a bucket of its own size (min_bucket_reso and "
        "max_bucket_reso then do not shape buckets).",
        metadata="ss_bucket_no_upscale",
        per_dataset=True,
    )
    min_bucket_reso: int = flag(
        256, "Shortest side of a bucket in pixels.", at_least=64, metadata="ss_min_bucket_reso", per_dataset=True
    )
    max_bucket_reso: int = flag(
        1024, "Longest side of a bucket in pixels.", at_least=64, metadata="ss_max_bucket_reso", per_dataset=True
    )
    bucket_reso_steps: int = flag(64, "Bucket sides are multiples of this, itself a multiple of 8.", at_least=8)
    resize_interpolation: str | None = flag(
        None,
        "How images are scaled; not set: by area where they shrink, by Lanczos where they grow.",
        choices=INTERPOLATIONS,
        metadata="ss_resize_interpolation",
    )
    alpha_color: str = flag("#ffffff", "Colour that transparent images are laid on, as #rrggbb.")
    color_aug: bool = flag(
        False,
        "Vary hue or brightness of the images slightly. Excludes cached latents.",
        metadata="ss_color_aug",
        per_dataset=True,
    )
    flip_aug: bool = flag(
        False, "Mirror half of the images left to right, chosen by chance.", metadata="ss_flip_aug", per_dataset=True
    )
    random_crop: bool = flag(
        False,
        "Crop at a place chosen by chance and not at the centre. Excludes cached latents.",
        metadata="ss_random_crop",
        per_dataset=True,
    )
    face_crop_aug_range: tuple[float, float] | None = flag(
        None,
        "Crop around the face that a file name tells (..._cx_cy_w_h), between so many and so many times its size, for "
        "example 2.0,4.0. Without buckets only; excludes cached latents.",
        metadata="ss_face_crop_aug_range",
    )
    crop_conditioning: CropConditioning = flag(
        "exact",
        "Where an image was cropped, as Stable Diffusion XL is told it: exact = where it was, kohya = as sd-scripts "
        "calculates it, which is that of an image with borders.",
        choices=get_args(CropConditioning),
        needs="size_conditioning",
    )
    data_aesthetic_score: float = flag(
        7.0,
        "How beautiful the images are, from 0 to 10, for the refiner of Stable Diffusion XL; an image's own score "
        "beats it.",
        needs="aesthetic_score",
    )
    max_data_loader_n_workers: int = flag(
        8,
        "Processes that prepare images beside the training; 0 = a thread of the training does it.",
        at_least=0,
        may_change_on_resume=True,
    )
    debug_dataset: bool = flag(
        False, "Write a page that shows what the model would be given, and stop there.", may_change_on_resume=True
    )
