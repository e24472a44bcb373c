"""Where the pictures and captions are, and what is done to them on their way to the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options.flag import flag


@dataclass(frozen=True)
class DatasetOptions:
    """Pictures, captions, buckets and caches."""

    train_data_dir: Path | None = flag(
        None, "Folder with the training folders, each named <repeats>_<identifier> <class>, for example 10_sks dog."
    )
    reg_data_dir: Path | None = flag(
        None, "Folder with the regularisation folders, each named <repeats>_<class>, for example 1_dog."
    )
    resolution: tuple[int, int] | None = flag(
        None, "Training resolution: 512 for a square, or width,height such as 512,768.", metadata="ss_resolution"
    )
    train_batch_size: int = flag(
        1, "Images in one batch of one device.", at_least=1, metadata="ss_batch_size_per_device"
    )
    enable_bucket: bool = flag(
        False,
        "Sort images of different shapes into buckets of about the training resolution's area instead of "
        "cropping all to one shape.",
        metadata="ss_enable_bucket",
    )
    bucket_no_upscale: bool = flag(
        False,
        "Never enlarge an image: a small one gets a bucket of its own size (min_bucket_reso and "
        "max_bucket_reso then do not shape buckets).",
        metadata="ss_bucket_no_upscale",
    )
    min_bucket_reso: int = flag(256, "Shortest side of a bucket in pixels.", at_least=64, metadata="ss_min_bucket_reso")
    max_bucket_reso: int = flag(1024, "Longest side of a bucket in pixels.", at_least=64, metadata="ss_max_bucket_reso")
    bucket_reso_steps: int = flag(64, "Bucket sides are multiples of this, itself a multiple of 8.", at_least=8)
    caption_extension: str = flag(
        ".caption",
        "File ending of the captions beside the images; a missing dot is added.",
        aliases=("caption_extention",),
    )
    shuffle_caption: bool = flag(
        False,
        "Shuffle the comma-separated parts of a caption anew each time it is read.",
        metadata="ss_shuffle_caption",
    )
    keep_tokens: int = flag(
        0,
        "With shuffle_caption: the first so many parts of a caption stay where they are.",
        at_least=0,
        metadata="ss_keep_tokens",
    )
    caption_dropout_rate: float = flag(
        0.0,
        "Chance that an image is shown with an empty caption.",
        at_least=0,
        at_most=1,
        metadata="ss_caption_dropout_rate",
    )
    caption_dropout_every_n_epochs: int = flag(
        0,
        "In every n-th epoch all captions are empty; 0 = never.",
        at_least=0,
        metadata="ss_caption_dropout_every_n_epochs",
    )
    color_aug: bool = flag(
        False, "Vary hue or brightness of the images slightly. Excludes cached latents.", metadata="ss_color_aug"
    )
    flip_aug: bool = flag(False, "Mirror half of the images left to right, chosen by chance.", metadata="ss_flip_aug")
    random_crop: bool = flag(
        False,
        "Crop at a place chosen by chance and not at the centre. Excludes cached latents.",
        metadata="ss_random_crop",
    )
    cache_latents: bool = flag(
        False,
        "Encode every image once before training and keep the result in memory: faster, and the VAE leaves the device.",
        metadata="ss_cache_latents",
    )
    cache_latents_to_disk: bool = flag(
        False, "Keep the encoded images in files beside the images, for later runs too. Includes cache_latents."
    )
    vae_batch_size: int = flag(
        1, "Images that are encoded together when latents are cached.", at_least=1, zero_is_off=True
    )
    max_data_loader_n_workers: int = flag(
        8, "Processes that prepare images beside the training; 0 = the training process does it itself.", at_least=0
    )
    persistent_data_loader_workers: bool = flag(
        False, "Keep these processes from one epoch to the next, which saves the pause between epochs and takes memory."
    )
    debug_dataset: bool = flag(False, "Show what the model would be given, image by image, and stop before training.")
