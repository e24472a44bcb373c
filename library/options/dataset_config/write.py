"""Write records as kohya's dataset file (TOML) or as SimpleTuner's multidatabackend.json.

Only values other than the built-in defaults are written. What the format cannot express is reported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from library.options.convert_values import format_value
from library.options.dataset_config.keys import DREAMBOOTH, FINE_TUNING, KEYS, Key, Kind
from library.options.dataset_config.simpletuner_keys import ALIGNMENT, SEPARATORS
from library.options.datasets import BucketSettings, CaptionSettings, DatasetSpec, SubsetSpec

_SPLITS = {separator: name for name, separator in SEPARATORS.items()}
_VARIANTS = 10  # of a shuffled caption; SimpleTuner needs a number
_TEXT_FILES = (".txt",)

Table = dict[str, Any]


@dataclass(frozen=True)
class Written:
    """The text of a file, and what it cannot express of the records (`lost`)."""

    text: str
    lost: tuple[str, ...]


@dataclass
class _Lost:
    """Settings that the format cannot express, once each, with the names of their subsets."""

    _found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, text: str, place: str) -> None:
        places = self._found.setdefault(text, [])
        if place not in places:
            places.append(place)

    def texts(self) -> tuple[str, ...]:
        return tuple(f"{', '.join(places)}: {text}" for text, places in self._found.items())


def _name(subset: SubsetSpec) -> str:
    source = subset.image_dir or subset.metadata_file or subset.shards
    name = source.rstrip("/").rpartition("/")[2] if isinstance(source, str) else source.name if source else ""
    return name or subset.origin


def _note_urls(subset: SubsetSpec, lost: _Lost) -> None:
    for place in (subset.image_dir, subset.mask_dir):
        if isinstance(place, str):
            lost.add(f"{place} is a URL, which only this trainer reads: copy the folder", _name(subset))


def _records(dataset: DatasetSpec, subset: SubsetSpec | None) -> Mapping[str, object]:
    """The records of a dataset or subset, by their names in the table of keys."""
    found: Mapping[str, object] = {"dataset": dataset, "buckets": dataset.buckets}
    return found if subset is None else {"subset": subset, "captions": subset.captions, "images": subset.images}


_DEFAULTS = {
    **_records(DatasetSpec("", BucketSettings((0, 0)), ()), None),
    **_records(DatasetSpec("", BucketSettings((0, 0)), ()), SubsetSpec(None, "")),
}


def _changed(dataset: DatasetSpec, subset: SubsetSpec | None) -> Iterable[tuple[Key, Any]]:
    """Keys whose fields differ from the built-in default, with the values to write."""
    records = _records(dataset, subset)
    for key in KEYS.values():
        record, _, name = (key.target or "").partition(".")
        if record in records:
            value = getattr(records[record], name)
            if value != getattr(_DEFAULTS[record], name):
                yield key, _plain(key, value)


def _plain(key: Key, value: Any) -> Any:
    """A value as TOML and JSON can represent it."""
    if key.target == "subset.caption_extensions":
        return ",".join(value)
    if key.target == "images.background":
        return "#" + bytes(value).hex()
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def to_kohya(datasets: Sequence[DatasetSpec]) -> Written:
    """Write datasets as kohya's dataset file."""
    lost = _Lost()
    tables = []
    for dataset in datasets:
        for kind in (DREAMBOOTH, FINE_TUNING):  # a dataset of kohya has one kind
            subsets = [
                subset for subset in dataset.subsets if (subset.metadata_file is not None) == (kind is FINE_TUNING)
            ]
            if subsets:
                tables.append(_kohya_dataset(dataset, subsets, lost))
    return Written("\n".join(map(_block, tables)), lost.texts())


def _block(table: Table) -> str:
    """The TOML of a dataset, with a header for each subset."""
    own = {name: value for name, value in table.items() if name != "subsets"}
    subsets = (f"\n[[datasets.subsets]]\n{tomli_w.dumps(subset)}" for subset in table["subsets"])
    return f"[[datasets]]\n{tomli_w.dumps(own)}{''.join(subsets)}"


def _kind(subset: SubsetSpec) -> Kind:
    return DREAMBOOTH if subset.metadata_file is None else FINE_TUNING


def _kohya_dataset(dataset: DatasetSpec, subsets: Sequence[SubsetSpec], lost: _Lost) -> Table:
    width, height = dataset.buckets.resolution
    table: Table = {"resolution": width if width == height else [width, height], "batch_size": dataset.batch_size}
    table |= {key.name: value for key, value in _changed(dataset, None)}
    places = [_name(subset) for subset in subsets]
    for place in places:
        if dataset.buckets.rule != "kohya" and dataset.buckets.enabled:
            at = "a shorter edge" if dataset.buckets.rule == "shorter_edge" else "the area"
            lost.add(
                f"each image keeps its own aspect ratio at {at} of {width}: kohya's buckets come from a fixed list",
                place,
            )
        if dataset.buckets.shrink_to is not None:
            lost.add("target_downsample_size: kohya resizes images to cover their bucket before the crop", place)
        if any(subset.is_reg and not subset.validation for subset in subsets) and not any(
            not subset.is_reg and not subset.validation for subset in subsets
        ):
            lost.add("regularisation images without training images of the same size: put both into one dataset", place)
    table["subsets"] = [_kohya_subset(dataset, subset, lost) for subset in subsets]
    return table


def _kohya_subset(dataset: DatasetSpec, subset: SubsetSpec, lost: _Lost) -> Table:
    place = _name(subset)
    _note_urls(subset, lost)
    table: Table = {}
    for key, value in _changed(dataset, subset):
        if _kind(subset) in key.kinds:
            table[key.name] = value
        else:
            lost.add(f"{key.name} = {format_value(value)}: not allowed with a metadata_file", place)
    if subset.caption_source == "file_name":
        lost.add("captions from file names: write them into caption files", place)
    elif subset.caption_source == "class_tokens":
        lost.add("one caption for all images, even those with a caption file", place)
    if subset.recursive:
        lost.add("images in sub-folders: list each folder as a subset", place)
    if subset.least_edge or subset.least_area:
        lost.add("minimum_image_size: small images are not skipped", place)
    if subset.images.corner_crop:
        lost.add("crop_style corner: images are cropped at the centre", place)
    order = ["image_dir", "metadata_file", "shards", "shard_table", *table]
    return {name: table[name] for name in dict.fromkeys(order) if name in table}


def to_simpletuner(datasets: Sequence[DatasetSpec]) -> Written:
    """Write datasets as a multidatabackend.json: an entry per subset and its masks, and the required caption cache."""
    lost, ids = _Lost(), set[str]()
    entries: list[Table] = []
    for dataset in datasets:
        for subset in dataset.subsets:
            entries += _entries(dataset, subset, _new_id(_name(subset), dataset.buckets, ids), lost)
    entries.append({
        "id": _unique("text-embeds", ids), "type": "local", "dataset_type": "text_embeds", "default": True,
        "cache_dir": "cache/text",
    })  # fmt: skip
    return Written(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", lost.texts())


def _new_id(name: str, buckets: BucketSettings, ids: set[str]) -> str:
    return _unique(name if name not in ids else f"{name}-{buckets.resolution[0]}", ids)


def _unique(name: str, ids: set[str]) -> str:
    number, found = 1, name
    while found in ids:
        number += 1
        found = f"{name}-{number}"
    ids.add(found)
    return found


def _entries(dataset: DatasetSpec, subset: SubsetSpec, name: str, lost: _Lost) -> list[Table]:
    place = _name(subset)
    _note_urls(subset, lost)
    sizes = _sizes(dataset.buckets, subset, lost)
    captions, covered = _captions(subset, lost)
    entry: Table = {
        "id": name, "type": "local", "dataset_type": "eval" if subset.validation else "image",
        "instance_data_dir": str(subset.image_dir or ""),
        "cache_dir_vae": f"cache/vae/{name}", **sizes, **captions, "repeats": subset.repeats - 1,
    }  # fmt: skip
    if subset.is_reg:
        entry["is_regularisation_data"] = True
    if subset.is_reg and not subset.validation:
        lost.add("is_reg: SimpleTuner compares regularisation images with the base model's prediction", place)
    if subset.shards is not None:
        lost.add("images in shards: unpack them into a folder, tools/make_shards.py --unpack", place)
    elif subset.image_dir is None:
        lost.add("images listed only in a metadata_file: put them into a folder", place)
    if not subset.recursive:
        lost.add("SimpleTuner reads sub-folders too", place)
    if dataset.batch_size != 1:
        lost.add(f"batch_size = {dataset.batch_size}: set --train_batch_size on SimpleTuner's command line", place)
    covered |= {"subset.image_dir", "subset.shards", "subset.repeats", "subset.is_reg", "subset.validation"}
    covered |= {"subset.mask_dir", "images.random_crop"}
    for key, value in [*_changed(dataset, None), *_changed(dataset, subset)]:
        if key.target not in covered and not str(key.target).startswith("buckets."):
            lost.add(f"{key.name} = {format_value(value)}", place)
    if subset.mask_dir is None:
        return [entry]
    lost.add("SimpleTuner needs masks with the file names of their images, including extensions", place)
    masks = {
        "id": f"{name}-masks", "type": "local", "dataset_type": "conditioning", "conditioning_type": "mask",
        "instance_data_dir": str(subset.mask_dir), **sizes,
    }  # fmt: skip
    return [entry | {"conditioning_data": f"{name}-masks"}, masks]


def _sizes(buckets: BucketSettings, subset: SubsetSpec, lost: _Lost) -> Table:
    """The keys for resolution, crop and minimum size."""
    place, (width, height) = _name(subset), buckets.resolution
    if buckets.rule == "kohya" and buckets.enabled:
        limits = "no_upscale" if buckets.no_upscale else f"{buckets.smallest} to {buckets.largest} pixels"
        lost.add(f"kohya's buckets ({limits}): SimpleTuner keeps each image's aspect ratio at the same area", place)
    elif not buckets.enabled and width != height:
        lost.add(
            f"resolution {width},{height} for all images: SimpleTuner keeps each image's aspect ratio at this area",
            place,
        )
    if buckets.enabled and buckets.step != ALIGNMENT:
        lost.add(
            f"bucket_reso_steps = {buckets.step}: set --aspect_bucket_alignment on SimpleTuner's command line", place
        )
    square = not buckets.enabled and width == height
    by_edge = buckets.rule == "shorter_edge" or (
        square and buckets.shrink_to is None and bool(subset.least_edge) and not subset.least_area
    )
    edge = width if by_edge or width == height else round(math.sqrt(width * height))
    table: Table = {"resolution": edge, "resolution_type": "pixel" if by_edge else "pixel_area"}
    images = subset.images
    table["crop"] = square or images.random_crop or images.corner_crop or buckets.shrink_to is not None
    if table["crop"]:
        table["crop_aspect"] = "square" if square else "preserve"
        table["crop_style"] = "random" if images.random_crop else "corner" if images.corner_crop else "center"
    least = subset.least_edge if by_edge else _root(subset.least_area)
    if least:
        table["minimum_image_size"] = least
    implied = square and subset.least_edge == math.ceil(math.sqrt(subset.least_area))
    if subset.least_area if by_edge else subset.least_edge and not implied:
        lost.add("minimum edge and minimum area of images: SimpleTuner has only one minimum size", place)
    if buckets.shrink_to is not None:
        target = _whole(buckets.shrink_to) if by_edge else _root(buckets.shrink_to)
        table |= {"maximum_image_size": target, "target_downsample_size": target}
    return table


def _root(area: float) -> float:
    """The side of a square with this area."""
    return _whole(math.sqrt(area))


def _whole(length: float) -> float:
    return int(length) if length == int(length) else length


def _captions(subset: SubsetSpec, lost: _Lost) -> tuple[Table, set[str]]:
    """The keys of captions, and the fields that they cover."""
    place, captions = _name(subset), subset.captions
    table, covered = _shuffled(captions)
    if table:
        lost.add(f"shuffle_caption: SimpleTuner makes {_VARIANTS} fixed variants of each caption", place)
    if subset.caption_source == "class_tokens":
        prompts = (subset.class_tokens or "").split("\n")
        table |= {"caption_strategy": "instanceprompt", "instance_prompt": prompts if len(prompts) > 1 else prompts[0]}
        several = {"captions.wildcard"} if len(prompts) > 1 else set()
        return table, covered | several | {"subset.class_tokens", "subset.caption_extensions"}
    if captions.prefix:
        table |= {"instance_prompt": captions.prefix, "prepend_instance_prompt": True}
        covered.add("captions.prefix")
    if subset.caption_source == "file_name":
        return {"caption_strategy": "filename", **table}, covered | {"subset.caption_extensions"}
    if not captions.wildcard:
        table["disable_multiline_split"] = True
    if subset.caption_source == "metadata":
        lost.add("captions of a metadata_file: write them into .txt files beside the images", place)
    elif subset.caption_extensions != _TEXT_FILES:
        endings = ", ".join(subset.caption_extensions)
        lost.add(f"caption_extension = {endings}: SimpleTuner reads captions from .txt files, rename them", place)
    if subset.class_tokens is not None:
        text = f"class_tokens = {format_value(subset.class_tokens)} for images without a caption file: write a caption "
        lost.add(f"{text}file for each (or set caption_strategy instanceprompt for one caption on all)", place)
    return {"caption_strategy": "textfile", **table}, covered | {
        "captions.wildcard", "subset.caption_extensions", "subset.class_tokens", "subset.metadata_file"
    }  # fmt: skip


def _shuffled(captions: CaptionSettings) -> tuple[Table, set[str]]:
    if not captions.shuffle or captions.separator not in _SPLITS:
        return {}, set()
    shuffle = {
        "enable": True, "count": _VARIANTS, "split_on": _SPLITS[captions.separator],
        "position_start": captions.keep_tokens, "include_original": False,
    }  # fmt: skip
    return {"caption_shuffle": shuffle}, {"captions.shuffle", "captions.keep_tokens", "captions.separator"}
