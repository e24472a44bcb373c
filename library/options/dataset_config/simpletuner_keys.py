"""Keys of SimpleTuner's multidatabackend.json: those that are read, those that are not needed, and unsupported ones.

Names, values and defaults are those of its documentation/DATALOADER.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

RESOLUTION_TYPES = ("pixel", "area", "pixel_area")
STRATEGIES = ("textfile", "filename", "instanceprompt")
CROP_STYLES = ("center", "centre", "random", "corner")
SEPARATORS: Mapping[str, str] = MappingProxyType({"comma": ",", "space": " ", "period": "."})  # of caption_shuffle
ALIGNMENT = 64  # default of --aspect_bucket_alignment

SNAPPED: Mapping[float, int] = MappingProxyType({0.25: 512, 0.5: 768, 1.0: 1024, 2.0: 1536, 4.0: 2048})
"""Megapixels -> side of a square crop; also for values within SNAP_RANGE of them."""
SNAP_RANGE = 0.05

READ = (
    "id",
    "type",
    "dataset_type",
    "disabled",
    "disable",
    "instance_data_dir",
    "metadata_backend",
    "resolution",
    "resolution_type",
    "minimum_image_size",
    "maximum_image_size",
    "target_downsample_size",
    "crop",
    "crop_aspect",
    "crop_aspect_buckets",
    "crop_style",
    "caption_strategy",
    "instance_prompt",
    "prepend_instance_prompt",
    "only_instance_prompt",
    "disable_multiline_split",
    "caption_shuffle",
    "repeats",
    "probability",
    "is_regularisation_data",
    "is_regularization_data",
    "conditioning_data",
    "conditioning_type",
    "source_dataset_id",
)

NOT_NEEDED = (
    "cache_dir",
    "cache_dir_vae",
    "cache_dir_conditioning_image_embeds",
    "cache_file_suffix",
    "compress_cache",
    "conditioning_image_embed_batch_size",
    "conditioning_image_embeds",
    "default",
    "disable_validation",
    "hash_filenames",
    "image_embeds",
    "metadata_update_interval",
    "preserve_data_backend_cache",
    "read_batch_size",
    "scan_for_errors",
    "shorten_filenames",
    "skip_file_discovery",
    "text_cache_disable",
    "text_cache_ondemand",
    "text_embeds",
    "text_encoder_batch_size",
    "vae_batch_size",
    "vae_cache_clear_each_epoch",
    "vae_cache_disable",
    "vae_cache_ondemand",
    "write_batch_size",
)
"""Caching, file search and progress in SimpleTuner; no effect on the training data."""

UNSUPPORTED: Mapping[str, tuple[object, str]] = MappingProxyType(
    {
        "minimum_aspect_ratio": (None, "take the images out of the folder"),
        "maximum_aspect_ratio": (None, "take the images out of the folder"),
        "max_num_samples": (None, "put that many images into a separate folder"),
        "max_upscale_threshold": (None, "skip small images with minimum_image_size"),
        "start_epoch": (1, "train in two runs, the second with --resume"),
        "start_step": (0, "train in two runs, the second with --resume"),
        "end_epoch": (None, "train in two runs, the second with --resume"),
        "end_step": (None, "train in two runs, the second with --resume"),
        "timestep_sampling_offset": (0, "remove it"),
        "slider_strength": (None, "remove it"),
        "caption_filter_list": (None, "change the caption files themselves"),
        "conditioning": (None, "prepare the images yourself; only masks are supported"),
        "delete_unwanted_images": (False, "remove it; nothing is ever deleted here"),
        "delete_problematic_images": (False, "remove it; nothing is ever deleted here"),
        "delete_nsfw_images": (False, "remove it; nothing is ever deleted here"),
        "video": (None, "remove it; only images are trained on"),
        "audio": (None, "remove it; only images are trained on"),
        "parquet": (None, "write the captions into .txt files beside the images"),
        "huggingface": (None, "save the images into a folder"),
        "webshart": (None, "read the shards by a dataset file with the key shards, see docs/data.md"),
        "config": (None, "remove it"),
    }
)
"""Key -> the value without effect, and the remedy for any other value."""

KNOWN = (*READ, *NOT_NEEDED, *UNSUPPORTED)
