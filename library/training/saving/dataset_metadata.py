"""Metadata of an adapter's file about its images: ss_datasets, ss_dataset_dirs, ss_tag_frequency and so on.

Keys and structure are those of sd-scripts, which other tools read. The numbers are those of the training: samples after
balancing regularisation images, and batches as they are in an epoch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.data.captions import tag_frequency
from library.options.datasets import DatasetSpec, Size, SubsetSpec

if TYPE_CHECKING:
    from library.options.train_options import TrainOptions
    from library.training.plan.images import Images, SubsetCount

Json = dict[str, Any]


def dataset_metadata(options: TrainOptions, images: Images) -> dict[str, str]:
    """The metadata with JSON values. A dataset file has other keys than folders."""
    names = _unique_names([count.subset for count in images.subsets])
    tag_names = _names_by_place([count.subset for count in images.subsets], names)
    if described_by_file(options):
        metadata: Json = {
            "ss_datasets": _datasets(images, tag_names),
            "ss_dataset_dirs": _folders(images.subsets, names, is_reg=False),
            "ss_tag_frequency": _merged_tags(images, tag_names),
        }
    else:
        metadata = {
            "ss_dataset_dirs": _folders(images.subsets, names, is_reg=False),
            "ss_reg_dataset_dirs": _folders(images.subsets, names, is_reg=True),
            "ss_tag_frequency": tag_frequency(images.scan.records, tag_names),
            "ss_bucket_info": _bucket_info(images, 0),
        }
    return {key: json.dumps(value) for key, value in metadata.items()}


def described_by_file(options: TrainOptions) -> bool:
    """Whether a dataset file describes the datasets, each with its own settings."""
    return options.dataset.dataset_config is not None or options.dataset.data_backend_config is not None


def largest_resolution(images: Images) -> Size:
    """(width, height) of the dataset with the most pixels per image."""
    return max((dataset.buckets.resolution for dataset in images.scan.datasets), key=lambda size: size[0] * size[1])


def _name(subset: SubsetSpec) -> str:
    """The name of the metadata file of a subset, else of its folder."""
    return Path(_place(subset)).name


def _place(subset: SubsetSpec) -> str:
    return os.path.abspath(subset.metadata_file or subset.source)


def _training_first(subsets: Sequence[SubsetSpec]) -> list[int]:
    return sorted(range(len(subsets)), key=lambda number: subsets[number].is_reg)


def _unique_names(subsets: Sequence[SubsetSpec]) -> list[str]:
    """A name for each subset; a second one with the same name is "name (2)", regularisation after training."""
    names: dict[int, str] = {}
    for number in _training_first(subsets):
        free, count = _name(subsets[number]), 2
        while free in names.values():
            free, count = f"{_name(subsets[number])} ({count})", count + 1
        names[number] = free
    return [names[number] for number in range(len(subsets))]


def _names_by_place(subsets: Sequence[SubsetSpec], names: Sequence[str]) -> list[str]:
    """The name for each subset that a folder of several datasets shares: its first one."""
    first: dict[str, str] = {}
    for number in _training_first(subsets):
        first.setdefault(_place(subsets[number]), names[number])
    return [first[_place(subset)] for subset in subsets]


def _folders(subsets: Sequence[SubsetCount], names: Sequence[str], *, is_reg: bool) -> Json:
    return {
        name: {"n_repeats": count.subset.repeats, "img_count": count.images - count.held_out}
        for name, count in zip(names, subsets, strict=True)
        if count.subset.is_reg == is_reg
    }


def _merged_tags(images: Images, names: Sequence[str]) -> Json:
    """Tags by folder; a folder of several datasets is counted once, with the first of them."""
    tags: Json = {}
    for number in range(len(images.scan.datasets)):
        tags = _tags_of(images, names, number) | tags
    return tags


def _tags_of(images: Images, names: Sequence[str], number: int) -> Json:
    return tag_frequency((record for record in images.scan.records if record.dataset == number), names)


def _bucket_info(images: Images, number: int) -> Json | None:
    """Samples by bucket, and the mean difference between the aspect ratios of images and buckets."""
    if not images.scan.datasets[number].buckets.enabled:
        return None
    used = [
        {"resolution": list(bucket), "count": count}
        for (dataset, bucket), count in images.table.samples.items()
        if dataset == number
    ]
    errors = [
        abs(placement.bucket[0] / placement.bucket[1] - record.size[0] / record.size[1])
        for record, placement in zip(images.scan.records, images.table.placements, strict=True)
        if record.dataset == number
    ]
    return {
        "buckets": {str(index): bucket for index, bucket in enumerate(used)},
        "mean_img_ar_error": sum(errors) / max(1, len(errors)),
    }


def _datasets(images: Images, names: Sequence[str]) -> list[Json]:
    counts = iter(images.subsets)
    return [
        _dataset(images, number, dataset, [next(counts) for _ in dataset.subsets], names)
        for number, dataset in enumerate(images.scan.datasets)
    ]


def _dataset(
    images: Images, number: int, dataset: DatasetSpec, subsets: Sequence[SubsetCount], names: Sequence[str]
) -> Json:
    by_folder = any(subset.metadata_file is None for subset in dataset.subsets)
    buckets = dataset.buckets
    scalings = {subset.images.interpolation for subset in dataset.subsets}
    return {
        "is_dreambooth": by_folder,
        "batch_size_per_device": dataset.batch_size,
        "num_train_images": sum(count.samples for count in subsets if not count.subset.is_reg),
        "num_reg_images": sum(count.samples for count in subsets if count.subset.is_reg),
        "resolution": list(buckets.resolution),
        "enable_bucket": buckets.enabled,
        "min_bucket_reso": buckets.smallest if buckets.enabled else None,
        "max_bucket_reso": buckets.largest if buckets.enabled else None,
        "tag_frequency": _tags_of(images, names, number),
        "bucket_info": _bucket_info(images, number),
        "resize_interpolation": scalings.pop() if len(scalings) == 1 else None,
        "subsets": [_subset(count, by_folder=by_folder) for count in subsets],
    }


def _subset(count: SubsetCount, *, by_folder: bool) -> Json:
    subset, captions, images = count.subset, count.subset.captions, count.subset.images
    metadata: Json = {
        "img_count": count.images - count.held_out,
        "num_repeats": subset.repeats,
        "color_aug": images.colour,
        "flip_aug": images.flip,
        "random_crop": images.random_crop,
        "shuffle_caption": captions.shuffle,
        "keep_tokens": captions.keep_tokens,
        "keep_tokens_separator": captions.keep_tokens_separator,
        "secondary_separator": captions.secondary_separator or None,
        "enable_wildcard": captions.wildcard,
        "caption_prefix": captions.prefix or None,
        "caption_suffix": captions.suffix or None,
        "resize_interpolation": images.interpolation,
    }
    if count.held_out:
        metadata["num_validation_images"] = count.held_out
    if subset.image_dir is not None:
        metadata["image_dir"] = Path(os.path.abspath(subset.image_dir)).name
    if subset.shards is not None:
        metadata["shards"] = Path(subset.shards).name
    if by_folder:
        return metadata | {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg}
    return metadata | {"metadata_file": _name(subset)}
