"""Resolve the datasets of a run from a dataset file (kohya or SimpleTuner), a metadata file, or folders."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

from library.data.scan import folders
from library.data.scan.caption_files import check_encoding, normal_extensions
from library.options.convert_values import read_colour
from library.options.datasets import (
    BucketSettings,
    CaptionSettings,
    DatasetSpec,
    ImageSettings,
    ParsedDatasets,
    SubsetSpec,
)
from library.options.groups.caption import CaptionOptions
from library.options.groups.dataset import DatasetOptions
from library.options.groups.mask import MaskOptions
from library.options.groups.validation import ValidationOptions
from library.options.mistakes import Mistake, Mistakes, UserError
from library.options.train_options import TrainOptions


def describe(options: TrainOptions) -> ParsedDatasets:
    """Resolve the datasets. Collects mistakes in the result; downloads remote folders."""
    mistakes = Mistakes()
    _check(options, mistakes)
    template = from_flags(options.dataset, options.caption, options.mask, options.validation)
    masks = template.subsets[0].mask_dir
    if isinstance(masks, Path) and not masks.is_dir():
        mistakes.extend([folders.no_folder("--conditioning_data_dir", masks)])
        template = replace(template, subsets=(replace(template.subsets[0], mask_dir=None),))  # so that it is told once
    try:
        found = _with_local_copies(_read_datasets(options, template), options.dataset)
    except UserError as error:
        found = ParsedDatasets(mistakes=error.mistakes)
    mistakes.extend(found.mistakes)
    return replace(found, mistakes=tuple(mistakes))


def _read_datasets(options: TrainOptions, template: DatasetSpec) -> ParsedDatasets:
    """Read whichever source the options set; the rules between flags ensure that it is one."""
    from library.options.dataset_config.kohya import read_kohya
    from library.options.dataset_config.simpletuner import read_backend

    data = options.dataset
    if data.dataset_config is not None:
        subset = replace(template.subsets[0], repeats=data.dataset_repeats)
        template = replace(template, subsets=(subset,))
        return read_kohya(data.dataset_config, template, masked_loss=options.mask.masked_loss)
    if data.data_backend_config is not None:
        return read_backend(data.data_backend_config, template)
    train, reg = local_folder(data.train_data_dir, data), local_folder(data.reg_data_dir, data)
    subset = template.subsets[0]
    template = replace(template, subsets=(replace(subset, mask_dir=local_folder(subset.mask_dir, data)),))
    if data.in_json is not None:
        return folders.metadata_file(data.in_json, train, template, data.dataset_repeats, reg)
    if data.class_tokens is not None and train is not None:
        return folders.plain_folder(train, template, data.class_tokens, data.num_repeats, reg)
    return folders.folder_datasets(train, reg, template)


def local_folder(place: Path | str | None, options: DatasetOptions) -> Path | None:
    """Return a local folder as it is, and for a URL an up-to-date local copy. Raises UserError."""
    if place is None or isinstance(place, Path):
        return place
    from library.data.scan.remote import local_copy

    return local_copy(place, cache_folder(options) / "remote", progress=True)


def _with_local_copies(found: ParsedDatasets, data: DatasetOptions) -> ParsedDatasets:
    """Replace each URL of a dataset file by its local copy, made once. Drops subsets without a copy, with a mistake."""
    copies: dict[Path | str | None, Path | None] = {}
    mistakes = Mistakes()
    mistakes.extend(found.mistakes)

    def localize(subset: SubsetSpec) -> SubsetSpec | None:
        if subset.shards is not None:
            return subset  # read in place
        places = subset.image_dir, subset.mask_dir
        for place in places:
            if place in copies:
                continue
            try:
                copies[place] = local_folder(place, data)
            except UserError as error:
                copies[place] = None
                mistakes.extend(Mistake(f"{each.what} ({subset.origin})", each.remedy) for each in error.mistakes)
        if any(place is not None and copies[place] is None for place in places):
            return None
        return replace(subset, image_dir=copies[places[0]], mask_dir=copies[places[1]])

    datasets = []
    for dataset in found.datasets:
        subsets = tuple(local for subset in dataset.subsets if (local := localize(subset)) is not None)
        datasets += [replace(dataset, subsets=subsets)] if subsets else []
    return replace(found, datasets=tuple(datasets), mistakes=tuple(mistakes))


def cache_folder(options: DatasetOptions) -> Path:
    """Folder of the index and of remote copies: --data_cache_dir, or the user's cache folder."""
    if options.data_cache_dir is not None:
        return options.data_cache_dir
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        if os.environ.get(variable):
            return Path(os.environ[variable]) / "dreamfolder"
    try:
        return Path.home() / ".cache" / "dreamfolder"
    except RuntimeError:  # no home directory is known
        return Path(tempfile.gettempdir()) / "dreamfolder"


def from_flags(
    data: DatasetOptions, caption: CaptionOptions, mask: MaskOptions, validation: ValidationOptions
) -> DatasetSpec:
    """The template for all datasets: one subset with the settings of the command line."""
    subset = SubsetSpec(
        image_dir=None,
        origin="--train_data_dir",
        caption_extensions=normal_extensions(caption.caption_extension),
        caption_encoding=caption.caption_encoding,
        mask_dir=mask.conditioning_data_dir if mask.masked_loss else None,
        alpha_mask=mask.alpha_mask,
        shard_copies=2 * data.shard_buffer,
        captions=caption_settings(caption),
        images=image_settings(data),
    )
    buckets = BucketSettings(
        resolution=data.resolution or (0, 0),
        enabled=data.enable_bucket,
        no_upscale=data.bucket_no_upscale,
        smallest=data.min_bucket_reso,
        largest=data.max_bucket_reso,
        step=data.bucket_reso_steps,
    )
    return DatasetSpec(
        origin="the options",
        buckets=buckets,
        subsets=(subset,),
        batch_size=data.train_batch_size,
        validation_split=validation.validation_split,
        validation_seed=validation.validation_seed,
    )


def caption_settings(options: CaptionOptions) -> CaptionSettings:
    """Caption settings of the command line."""
    return CaptionSettings(
        shuffle=options.shuffle_caption,
        keep_tokens=options.keep_tokens,
        dropout_rate=options.caption_dropout_rate,
        dropout_every_n_epochs=options.caption_dropout_every_n_epochs,
        prefix=options.caption_prefix or "",
        suffix=options.caption_suffix or "",
        separator=options.caption_separator,
        secondary_separator=options.secondary_separator or "",
        keep_tokens_separator=options.keep_tokens_separator,
        wildcard=options.enable_wildcard,
        tag_dropout_rate=options.caption_tag_dropout_rate,
        warmup_min=options.token_warmup_min,
        warmup_step=options.token_warmup_step,
    )


def image_settings(options: DatasetOptions) -> ImageSettings:
    """Image settings of the command line."""
    return ImageSettings(
        random_crop=options.random_crop,
        flip=options.flip_aug,
        colour=options.color_aug,
        face_crop=options.face_crop_aug_range,
        interpolation=options.resize_interpolation,
        background=read_colour(options.alpha_color) or (255, 255, 255),
    )


def _check(options: TrainOptions, mistakes: Mistakes) -> None:
    """Check values that the option parser does not check."""
    if read_colour(options.dataset.alpha_color) is None:
        mistakes.add(
            f'--alpha_color "{options.dataset.alpha_color}" is not a colour', "write it as #rrggbb; white is #ffffff"
        )
    encoding = check_encoding(options.caption.caption_encoding)
    if encoding is not None:
        mistakes.extend([encoding])
