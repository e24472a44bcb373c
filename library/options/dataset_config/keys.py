"""Table of the keys of kohya's dataset file: allowed levels, value type, and the record field they set.

Names, levels and kinds are those of sd-scripts (its docs/config_README-en.md); rows marked "ours" are additions.
"""

from __future__ import annotations

import codecs
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from library.options.convert_values import BadValue, is_remote
from library.options.groups.caption import NO_FILES

Level = Literal["general", "dataset", "subset"]
Kind = Literal["DreamBooth", "fine-tuning"]

# kohya's third kind, ControlNet, is for datasets with masks. Here either kind may have masks, so that a mask folder
# never changes the meaning of the other keys.
DREAMBOOTH: Kind = "DreamBooth"  # images in a folder with captions beside them
FINE_TUNING: Kind = "fine-tuning"  # images and captions from a metadata file

Reader = Callable[[object], Any]


@dataclass(frozen=True)
class Key:
    """One key. `read` converts the value from tomllib or json to that of the field, or raises BadValue.

    `target` is "<record>.<field>", where the record is dataset, buckets, subset, captions or images; None if several
    keys set a field together, or if no field corresponds.
    """

    name: str
    read: Reader
    target: str | None
    levels: tuple[Level, ...] = ("general", "dataset", "subset")
    kinds: tuple[Kind, ...] = (DREAMBOOTH, FINE_TUNING)


def _switch(raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    raise BadValue("is neither true nor false", "write true or false, without quotes")


def _whole(least: int) -> Reader:
    """Reader of integers of at least `least`."""

    def read(raw: object) -> int:
        if isinstance(raw, bool) or not isinstance(raw, int):
            raise BadValue("is not a whole number", _without_quotes(raw, "write a whole number such as 4"))
        if raw < least:
            raise BadValue(f"is below {least}", f"write a whole number of at least {least}")
        return raw

    return read


def _number(least: float, most: float = math.inf) -> Reader:
    """Reader of numbers from `least` to `most`."""

    def read(raw: object) -> float:
        if isinstance(raw, bool) or not isinstance(raw, (int, float)) or not math.isfinite(raw):
            raise BadValue("is not a number", _without_quotes(raw, "write a number such as 0.1"))
        if not least <= raw <= most:
            bounds = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise BadValue(f"is not a number {bounds}", "write a number in this range")
        return float(raw)

    return read


def _without_quotes(raw: object, otherwise: str) -> str:
    text = raw.strip() if isinstance(raw, str) else ""
    return f"write {text}, without quotes" if re.fullmatch(r"[+-]?\d+(\.\d+)?", text) else otherwise


def _text(raw: object) -> str:
    if not isinstance(raw, str):
        raise BadValue("is not a text", "write a text in quotes")
    return raw


def _some_text(raw: object) -> str:
    if _text(raw) == "":
        raise BadValue("is empty", "write a text, or remove the key")
    return str(raw)


def _path(raw: object) -> Path:
    if not isinstance(raw, str) or not raw.strip():
        raise BadValue("is not a path", "write the path in quotes")
    if "\0" in raw:
        raise BadValue("contains a NUL character", "remove it")
    if is_remote(raw):
        raise BadValue("is a URL", "only folders may be remote: copy the file here and write its path")
    path = os.path.expanduser(raw)
    if re.search(r"[\x01-\x1f]", raw) and not os.path.lexists(path):
        # TOML and JSON read the backslash in "C:\train" as an escape: a tab and "rain".
        remedy = r"write a Windows path as 'C:\train' (in JSON with two backslashes) or as C:/train"
        raise BadValue("contains a tab or another control character", remedy)
    return Path(path)


def folder(raw: object) -> Path | str:
    """A path, or a URL as text, since a Path would drop one of its slashes. Raises BadValue."""
    return raw if isinstance(raw, str) and is_remote(raw) and "\0" not in raw else _path(raw)


def same_place(place: Path | str | None) -> str:
    """Normalised path or URL, equal for two spellings of the same folder or file."""
    if isinstance(place, str):
        return place.rstrip("/")  # URLs are case-sensitive
    return os.path.normcase(os.path.normpath(place or ""))


def _extensions(raw: object) -> tuple[str, ...]:
    """One extension or (ours) several separated by commas: the first existing one is used. A missing dot is added.

    An empty text means that no caption file is read, as in sd-scripts.
    """
    if raw == "":
        return (NO_FILES,)
    extensions = [extension.strip() for extension in _text(raw).split(",")]
    if not all(extension.strip(".") for extension in extensions):
        raise BadValue("is not a file extension", 'write for example ".txt", or several as ".txt,.caption"')
    return tuple(extension if extension.startswith(".") else f".{extension}" for extension in extensions)


def _choice(*choices: str) -> Reader:
    def read(raw: object) -> str:
        if raw not in choices:
            raise BadValue("is not one of its values", f"choose one of {', '.join(choices)}")
        return str(raw)

    return read


def _encoding(raw: object) -> str:
    try:
        _some_text(raw).encode(str(raw))  # fails for codecs that do not encode text
        return codecs.lookup(str(raw)).name
    except (LookupError, UnicodeError):
        raise BadValue("is not an encoding known to Python", 'write for example "utf-8" or "shift_jis"') from None


def _colour(raw: object) -> tuple[int, int, int]:
    digits = re.fullmatch(r"#([0-9a-fA-F]{6})", _text(raw))
    if digits is None:
        raise BadValue("is not a colour", 'write red, green and blue as "#rrggbb", for example "#ffffff" for white')
    red, green, blue = bytes.fromhex(digits[1])
    return red, green, blue


def _face_range(raw: object) -> tuple[float, float]:
    remedy = "write two numbers, from and to, such as [2.0, 4.0]"
    if not isinstance(raw, list) or len(raw) != 2:
        raise BadValue("is not a pair of numbers", remedy)
    read = _number(0)
    try:
        low, high = read(raw[0]), read(raw[1])
    except BadValue:
        raise BadValue("is not a pair of numbers", remedy) from None
    if low > high:
        raise BadValue("has the larger number first", f"write [{high:g}, {low:g}]")
    return low, high


def _resolution(raw: object) -> tuple[int, int]:
    remedy = "write 512 for a square, or [width, height] such as [512, 768], without quotes"
    sides = raw if isinstance(raw, list) else [raw, raw]
    whole = [side for side in sides if isinstance(side, int) and not isinstance(side, bool) and side > 0]
    if len(sides) != 2 or len(whole) != 2:
        raise BadValue("is not a resolution", remedy)
    return whole[0], whole[1]


def _resolutions(raw: object) -> tuple[tuple[int, int], ...]:
    remedy = "write a list such as [512, 768, 1024] or [[512, 768], [768, 1024]]"
    if not isinstance(raw, list) or not raw:
        raise BadValue("is not a list of resolutions", remedy)
    try:
        found = tuple(_resolution(member) for member in raw)
    except BadValue:
        raise BadValue("is not a list of resolutions", remedy) from None
    if len(set(found)) < len(found):
        raise BadValue("contains the same resolution twice", "keep one of them; use num_repeats to repeat images")
    return found


def _batch_sizes(raw: object) -> tuple[int, ...]:
    """One batch size for all resolutions or (ours) a list with one for each."""
    read = _whole(1)
    if not isinstance(raw, list):
        return (read(raw),)
    if not raw:
        raise BadValue("is an empty list", "write a whole number such as 4, or a list with one for each resolution")
    try:
        return tuple(read(member) for member in raw)
    except BadValue as bad:
        raise BadValue(f"has an entry that {bad.fault}", "write a whole number such as 4") from None


def _attributes(raw: object) -> Mapping[str, object]:
    if not isinstance(raw, dict):
        raise BadValue("is not a table", "write custom_attributes = {}, or remove it")
    return raw


_DATASET: tuple[Level, ...] = ("general", "dataset")
_SUBSET: tuple[Level, ...] = ("subset",)
_INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")

_ROWS = (
    # of a dataset
    Key("resolution", _resolution, None, _DATASET),
    Key("resolutions", _resolutions, None, _DATASET),  # ours: the same images at each of these
    Key("batch_size", _batch_sizes, None, _DATASET),
    Key(
        "pixels_per_batch", _whole(1), None, _DATASET
    ),  # ours: batch size = as many images as fit into this number of pixels
    Key("enable_bucket", _switch, "buckets.enabled", _DATASET),
    Key("bucket_no_upscale", _switch, "buckets.no_upscale", _DATASET),
    Key("min_bucket_reso", _whole(64), "buckets.smallest", _DATASET),
    Key("max_bucket_reso", _whole(64), "buckets.largest", _DATASET),
    Key("bucket_reso_steps", _whole(1), "buckets.step", _DATASET),
    Key("validation_split", _number(0, 1), "dataset.validation_split", _DATASET),
    Key("validation_seed", _whole(0), "dataset.validation_seed", _DATASET),
    Key("network_multiplier", _number(-math.inf), None, _DATASET),
    # of a subset, allowed at any level
    Key("num_repeats", _whole(0), "subset.repeats"),
    Key("caption_extension", _extensions, "subset.caption_extensions", kinds=(DREAMBOOTH,)),
    Key("caption_encoding", _encoding, "subset.caption_encoding"),  # ours
    Key("class_tokens", _text, "subset.class_tokens", kinds=(DREAMBOOTH,)),
    Key("cache_info", _switch, None, kinds=(DREAMBOOTH,)),
    Key("custom_attributes", _attributes, None),
    Key("shuffle_caption", _switch, "captions.shuffle"),
    Key("keep_tokens", _whole(0), "captions.keep_tokens"),
    Key("keep_tokens_separator", _text, "captions.keep_tokens_separator"),
    Key("caption_separator", _some_text, "captions.separator"),
    Key("secondary_separator", _text, "captions.secondary_separator"),
    Key("caption_prefix", _text, "captions.prefix"),
    Key("caption_suffix", _text, "captions.suffix"),
    Key("enable_wildcard", _switch, "captions.wildcard"),
    Key("caption_dropout_rate", _number(0, 1), "captions.dropout_rate"),
    Key("caption_dropout_every_n_epochs", _whole(0), "captions.dropout_every_n_epochs"),
    Key("caption_tag_dropout_rate", _number(0, 1), "captions.tag_dropout_rate"),
    Key("token_warmup_min", _whole(0), "captions.warmup_min"),
    Key("token_warmup_step", _number(0), "captions.warmup_step"),
    Key("color_aug", _switch, "images.colour"),
    Key("flip_aug", _switch, "images.flip"),
    Key("random_crop", _switch, "images.random_crop"),
    Key("face_crop_aug_range", _face_range, "images.face_crop"),
    Key("resize_interpolation", _choice(*_INTERPOLATIONS), "images.interpolation"),
    Key("background", _colour, "images.background"),  # ours: background of transparent images
    Key("aesthetic_score", _number(0, 10), "subset.score"),  # ours: of images without one
    # of a subset only
    Key("image_dir", folder, "subset.image_dir", _SUBSET),
    Key("shards", _some_text, "subset.shards", _SUBSET, (DREAMBOOTH,)),  # ours: tar archives instead of image_dir
    Key("shard_table", folder, "subset.shard_table", _SUBSET, (DREAMBOOTH,)),  # ours
    Key("metadata_file", _path, "subset.metadata_file", _SUBSET, (FINE_TUNING,)),
    Key("conditioning_data_dir", folder, "subset.mask_dir", _SUBSET),
    Key("is_reg", _switch, "subset.is_reg", _SUBSET, (DREAMBOOTH,)),
    Key("validation", _switch, "subset.validation", _SUBSET),  # ours: images that are only validated on
    Key("alpha_mask", _switch, "subset.alpha_mask", _SUBSET),
)

KEYS: Mapping[str, Key] = MappingProxyType({key.name: key for key in _ROWS})

WRITE_INSTEAD: Mapping[str, str] = MappingProxyType(
    {
        "train_batch_size": "batch_size",
        "dataset_repeats": "num_repeats",
        "repeats": "num_repeats",
        "caption_extention": "caption_extension",
        "in_json": "metadata_file",
        "train_data_dir": "image_dir",
        "urls": "shards",
        "webdataset": "shards",
        "reg_data_dir": "image_dir with is_reg = true",
        "mask_dir": "conditioning_data_dir",
        "multires_training": "resolutions = [512, 768, 1024]",
        "is_val": "validation = true",
        "is_validation": "validation = true",
    }
)
"""Names from the command line and elsewhere that are too different from the right key to be matched."""
