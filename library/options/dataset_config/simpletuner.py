"""Read SimpleTuner's multidatabackend.json into the records of options/datasets.py, by SimpleTuner's rules.

Unlike SimpleTuner, all mistakes are reported at once with their lines, no key is ignored silently, and an image's
bucket depends on its own aspect ratio alone (SimpleTuner may use the bucket of the first image whose aspect ratio
rounds to the same two decimals).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from library.options.convert_values import format_value
from library.options.dataset_config.backend_entry import Entry, Notes
from library.options.dataset_config.keys import same_place
from library.options.dataset_config.simpletuner_keys import (
    CROP_STYLES,
    KNOWN,
    NOT_NEEDED,
    RESOLUTION_TYPES,
    SEPARATORS,
    SNAP_RANGE,
    SNAPPED,
    STRATEGIES,
    UNSUPPORTED,
)
from library.options.dataset_config.source import read_source
from library.options.datasets import BucketSettings, CaptionSettings, DatasetSpec, ParsedDatasets, SubsetSpec
from library.options.mistakes import Mistake, Mistakes
from library.options.text_files import BACKENDS

FLAG = "data_backend_config"

_CACHES = ("text_embeds", "image_embeds")
_MASKS = ("mask", "segmentation")
_MOST_MEGAPIXELS = 20
_FEWEST_PIXELS = 16  # smaller lengths are probably megapixels


def read_backend(path: Path, defaults: DatasetSpec) -> ParsedDatasets:
    """Read the datasets of a file; entries of equal sizes become subsets of one dataset.

    `defaults` supplies what the file cannot set (batch size, bucket steps, captions and augmentation of its first
    subset, if any) and the resolution of entries without one. User errors are collected, not raised.
    """
    mistakes = Mistakes()
    entries = _entries(path, mistakes)
    notes = Notes(path.name)
    masks, image_entries = dict[str, Entry](), list[Entry]()
    for entry in _enabled(entries, mistakes, notes):
        _check_keys(entry, notes)
        kind = entry.text("dataset_type") or "image"
        if kind in ("image", "eval"):
            image_entries.append(entry)
        elif kind == "conditioning" and _is_mask(entry):
            masks[entry.name] = entry
        elif kind in _CACHES:
            notes.add(f"{kind} is not needed: caches are found by content", entry)
        elif kind != "conditioning":
            entry.reject("dataset_type", "is not supported", 'remove the entry, or add "disabled": true')
    if not mistakes and all(entry.values.get("dataset_type") == "eval" for entry in image_entries):
        image_entries = []
        mistakes.add(f"--{FLAG} {path}: no entry describes images to train on", 'add one of "dataset_type": "image"')
    reader = _Reader(defaults, masks, notes)
    described = [reader.read(entry) for entry in image_entries]
    for name in masks.keys() - reader.used:
        notes.add("these masks are not used: no entry names them as conditioning_data", masks[name])
    if described and not described[0][1].captions.dropout_rate:
        notes.add("SimpleTuner drops a tenth of the captions by default, this trainer none "
                  "(set --caption_dropout_rate=0.1 for the same)")  # fmt: skip
    return ParsedDatasets(_grouped(described, defaults), notes.lines(), tuple(mistakes))


def _entries(path: Path, mistakes: Mistakes) -> list[Entry]:
    """The entries of the file; none if the file as a whole is invalid."""
    source = read_source(path, FLAG, BACKENDS)
    if isinstance(source, Mistake):
        mistakes.extend([source])
        return []
    tree = source.tree
    if not isinstance(tree, list) or not all(isinstance(entry, dict) for entry in tree):
        remedy = "write [ {...}, {...} ], as in SimpleTuner's multidatabackend.json"
        mistakes.add(f"--{FLAG} {path} is not a list of entries", remedy)
        return []
    for address, line in source.places.duplicates:
        mistakes.add(f"{address[-1]} is set twice in one entry ({source.name}, line {line})", "keep one of them")
    names = [entry.get("id") or f"#{index}" for index, entry in enumerate(tree, 1)]
    return [
        Entry(source, (index,), str(name), values, mistakes)
        for index, (name, values) in enumerate(zip(names, tree, strict=True))
    ]


def _enabled(entries: Iterable[Entry], mistakes: Mistakes, notes: Notes) -> Iterable[Entry]:
    """The entries that are not disabled. Each needs its own id, as ids link entries."""
    seen = set[str]()
    for entry in entries:
        if not entry.text("id"):
            mistakes.add(f"an entry has no id ({entry.origin})", 'give it one: "id": "my-images"')
        elif entry.name in seen:
            entry.reject("id", "is used by another entry too", "give each entry its own id")
        seen.add(entry.name)
        if entry.switch("disabled" if "disabled" in entry.values else "disable"):
            notes.add("disabled, skipped", entry)
        else:
            yield entry


def _check_keys(entry: Entry, notes: Notes) -> None:
    """Report unknown and unsupported keys as mistakes, keys that are not needed as a note."""
    for key, value in entry.values.items():
        if key in UNSUPPORTED:
            neutral, remedy = UNSUPPORTED[key]
            if value not in (neutral, None, "", [], {}):
                entry.reject(key, "is not supported", remedy)
        elif key == "cache_dir_vae":
            notes.add("cache_dir_vae is not used: caches are found by content", entry)
        elif key not in KNOWN:
            near = difflib.get_close_matches(key, KNOWN, 1, 0.6)
            entry.reject(key, "is not a key of this file", f"did you mean {near[0]}?" if near else "remove it")
    idle = [key for key in entry.values if key in NOT_NEEDED and key != "cache_dir_vae"]
    if idle and entry.values.get("dataset_type") not in _CACHES:
        notes.add(f"{', '.join(idle)}: not needed, ignored", entry)


def _is_mask(entry: Entry) -> bool:
    """Whether a conditioning entry has masks; otherwise a mistake."""
    if entry.values.get("conditioning_type") in _MASKS:
        return True
    remedy = 'only masks are supported ("conditioning_type": "mask"); remove the entry, or add "disabled": true'
    if "conditioning_type" in entry.values:
        entry.reject("conditioning_type", "is not supported", remedy)
    else:
        entry.reject("dataset_type", "needs a conditioning_type", remedy)
    return False


_Sizes = tuple[BucketSettings, int, int]  # buckets, least edge, least area


def _grouped(described: list[tuple[BucketSettings, SubsetSpec]], defaults: DatasetSpec) -> tuple[DatasetSpec, ...]:
    """Group entries of equal sizes into datasets, with each folder only once per dataset."""
    groups = dict[tuple[BucketSettings, int], list[SubsetSpec]]()
    for buckets, subset in described:
        turn = 0
        while _holds(groups.setdefault((buckets, turn), []), subset):
            turn += 1
        groups[buckets, turn].append(subset)
    return tuple(
        replace(defaults, origin=subsets[0].origin, buckets=buckets, subsets=tuple(subsets))
        for (buckets, _), subsets in groups.items()
    )


def _holds(subsets: Iterable[SubsetSpec], candidate: SubsetSpec) -> bool:
    folder = same_place(candidate.image_dir)
    return any(same_place(subset.image_dir) == folder for subset in subsets)


@dataclass
class _Reader:
    """Reads image entries. `used` collects the ids of the masks they name."""

    defaults: DatasetSpec
    masks: Mapping[str, Entry]
    notes: Notes

    def __post_init__(self) -> None:
        subsets = self.defaults.subsets
        self.base = subsets[0] if subsets else SubsetSpec(None, self.defaults.origin)
        self.used = set[str]()

    def read(self, entry: Entry) -> tuple[BucketSettings, SubsetSpec]:
        """Read one entry; faulty values are added to the mistakes and replaced by defaults."""
        for key, usual in (("type", ("local",)), ("metadata_backend", ("discovery", "json"))):
            entry.choice(key, usual, f"use {usual[0]}, with the images in a folder or at a URL")
        if entry.number("probability") not in (None, 0, 1):  # 0 counts as not set
            entry.reject("probability", "is not supported: repeats decide how often an image appears",
                         "remove it, and set repeats instead")  # fmt: skip
        buckets, least_edge, least_area = self._sizes(entry)
        images = replace(self.base.images, random_crop=False, corner_crop=False)
        validation = entry.text("dataset_type") == "eval"
        if entry.switch("crop"):
            centred = validation and entry.values.get("crop_style") in (None, "", "random")
            style = "center" if centred else self._crop_style(entry)
            images = replace(images, random_crop=style == "random", corner_crop=style == "corner")
        subset = replace(
            self._captions(entry),
            image_dir=entry.folder("instance_data_dir"),
            origin=entry.origin,
            repeats=1 if validation else self._repeats(entry),
            is_reg=self._is_reg(entry),
            validation=validation,
            metadata_file=None,
            recursive=True,
            mask_dir=self._mask_dir(entry),
            least_edge=least_edge,
            least_area=least_area,
            images=images,
        )
        return buckets, subset

    def _repeats(self, entry: Entry) -> int:
        """Repeats of an image; SimpleTuner counts the extra ones (0 = once)."""
        extra = entry.number("repeats") or 0
        if extra < 0 or extra != int(extra):
            entry.reject("repeats", "is not a whole number of at least 0", "write the extra passes: 0 = none")
            return 1
        return int(extra) + 1

    def _is_reg(self, entry: Entry) -> bool:
        british = "is_regularisation_data" in entry.values
        is_reg = entry.switch("is_regularisation_data" if british else "is_regularization_data")
        if is_reg and entry.text("dataset_type") != "eval":
            self.notes.add("is_regularisation_data means --preservation base_prediction, unless that flag is set: the "
                           "target of these images is the prediction of the base model", entry)  # fmt: skip
        return is_reg

    def _mask_dir(self, entry: Entry) -> Path | str | None:
        named = entry.values.get("conditioning_data") or []
        names = [named] if isinstance(named, str) else named
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            entry.reject("conditioning_data", "is not the id of an entry", 'write "conditioning_data": "my-masks"')
            return None
        names = names or [name for name, mask in self.masks.items()
                          if mask.values.get("source_dataset_id") == entry.name]  # fmt: skip
        if len(names) > 1:
            entry.reject("conditioning_data", "names several entries", "keep the one with the masks")
        if not names:
            return None
        mask = self.masks.get(names[0])
        if mask is None:
            entry.reject("conditioning_data", "is not the id of a mask entry",
                         'name an entry with "dataset_type": "conditioning", "conditioning_type": "mask"')  # fmt: skip
            return None
        return self._folder_of_masks(mask, entry)

    def _folder_of_masks(self, mask: Entry, entry: Entry) -> Path | str | None:
        if mask.name not in self.used:
            self.used.add(mask.name)
            if mask.values.get("conditioning_type") == "segmentation":
                self.notes.add("conditioning_type segmentation is read as a mask: grey counts partly", mask)
            sizes = ("crop", "crop_aspect", "crop_style", "resolution", "resolution_type", "minimum_image_size",
                     "maximum_image_size", "target_downsample_size")  # fmt: skip
            other = [key for key in sizes if key in mask.values and mask.values[key] != entry.values.get(key)]
            if other:
                self.notes.add(f"{', '.join(other)} ignored: masks are cropped like their images", mask)
        return mask.folder("instance_data_dir")

    def _sizes(self, entry: Entry) -> _Sizes:
        """The buckets, and the minimum edge and area of images."""
        crop = entry.switch("crop")
        square = crop and self._crop_aspect(entry) == "square"
        kind = entry.choice("resolution_type", RESOLUTION_TYPES) or "pixel_area"
        edge = self._edge(entry, kind, square=square)
        shrink_to = self._shrink_to(entry, kind)
        if shrink_to is not None and not crop:
            self.notes.add("maximum_image_size and target_downsample_size have no effect without crop", entry)
            shrink_to = None
        default = self.defaults.buckets
        buckets = BucketSettings(
            (edge, edge), not square, smallest=default.smallest, largest=default.largest, step=default.step,
            rule="shorter_edge" if kind == "pixel" else "area", shrink_to=shrink_to,
        )  # fmt: skip
        if square and shrink_to is None:
            buckets = replace(buckets, rule="kohya")  # one bucket: the rule has no effect
        least = self._length(entry, "minimum_image_size", kind)
        if kind == "pixel":
            return buckets, math.ceil(least), 0
        if least > 5e6:
            entry.reject("minimum_image_size", "would skip images of 5 megapixels",
                         f"it uses the unit of resolution_type {kind}")  # fmt: skip
        return buckets, math.ceil(math.sqrt(round(least))) if square else 0, round(least)

    def _edge(self, entry: Entry, kind: str, *, square: bool) -> int:
        """The side of the square with the resolution's area, or the shorter edge for kind pixel."""
        default = self.defaults.buckets
        value = entry.number("resolution")
        if value is None:
            if min(default.resolution) < 1:
                entry.reject("resolution", "is missing", 'write for example "resolution": 1024')
                return 512
            whole = min(default.resolution) if kind == "pixel" else math.sqrt(math.prod(default.resolution))
        else:
            length = self._length(entry, "resolution", kind)
            if length <= 0:
                entry.reject("resolution", "is not a size", 'write for example "resolution": 1024')
                return 512
            whole = length if kind == "pixel" else math.sqrt(length)
        if kind == "area" and square and value is not None:
            whole = next((side for share, side in SNAPPED.items() if abs(value - share) < SNAP_RANGE), whole)
        if kind == "pixel" and not square:
            return round(whole)  # rounded later, together with the longer edge
        edge = max(1, round(whole / default.step)) * default.step
        if edge != round(whole):
            self.notes.add(
                f"resolution {format_value(value)} becomes {edge}x{edge}, a multiple of {default.step}", entry
            )
        return edge

    def _length(self, entry: Entry, key: str, kind: str) -> float:
        """A size in pixels: an edge for kind pixel, else an area. 0 if not set."""
        value = entry.number(key) or 0
        if value < 0:
            entry.reject(key, "is below 0", "write a size, or remove it")
        elif kind == "area" and value >= _MOST_MEGAPIXELS:
            entry.reject(key, f"is too large: resolution_type area is in megapixels, below {_MOST_MEGAPIXELS}",
                         'for pixels write "resolution_type": "pixel_area"')  # fmt: skip
        elif kind != "area" and 0 < value < _FEWEST_PIXELS:
            entry.reject(key, f"is too small: resolution_type {kind} is in pixels",
                         'for megapixels write "resolution_type": "area"')  # fmt: skip
        else:
            return {"pixel": value, "area": value * 1e6, "pixel_area": value * value}[kind]
        return 0

    def _shrink_to(self, entry: Entry, kind: str) -> float | None:
        most, target = (self._length(entry, key, kind) for key in ("maximum_image_size", "target_downsample_size"))
        if bool(most) == bool(target):
            return float(round(target)) or None
        there, missing = "maximum_image_size", "target_downsample_size"
        if target:
            there, missing = missing, there
        entry.reject(there, f"is set without {missing}", f"add {missing}, or remove {there}")
        return None

    def _crop_aspect(self, entry: Entry) -> str:
        if entry.values.get("crop_aspect") in ("closest", "random"):
            entry.reject("crop_aspect", "is not supported",
                         'write "preserve" (each image at about its own aspect ratio) or "square"')  # fmt: skip
            return "preserve"
        return entry.choice("crop_aspect", ("square", "preserve")) or "square"

    def _crop_style(self, entry: Entry) -> str:
        if entry.values.get("crop_style") == "face":
            entry.reject("crop_style", "is not supported: there is no face detection", 'write "center" or "random"')
            return "center"
        style = entry.choice("crop_style", CROP_STYLES) or "random"
        if style == "random":
            implied = "" if entry.has_value("crop_style") else " (SimpleTuner's default)"
            self.notes.add(f"crop_style random{implied}: crops vary, so latents cannot be cached", entry)
        return style

    def _captions(self, entry: Entry) -> SubsetSpec:
        """A subset with the caption settings of an entry."""
        strategy = entry.choice("caption_strategy", STRATEGIES, "write the captions into .txt files and use textfile")
        if strategy is None:
            self.notes.add("no caption_strategy: captions are the file names, as in SimpleTuner", entry)
            strategy = "filename"
        prompts = entry.texts("instance_prompt")
        captions = self._shuffled(entry)
        if strategy == "instanceprompt" or entry.switch("only_instance_prompt"):
            if not prompts:
                entry.reject("instance_prompt", "is missing", "write the caption of all these images")
            captions = replace(captions, prefix="", wildcard=captions.wildcard or len(prompts) > 1)
            return replace(self.base, caption_source="class_tokens", class_tokens="\n".join(prompts) or None,
                           captions=captions)  # fmt: skip
        captions = replace(captions, prefix=self._prefix(entry, prompts))
        if strategy == "filename":
            return replace(self.base, caption_source="file_name", class_tokens=None, captions=captions)
        return replace(self.base, caption_source="files", caption_extensions=(".txt",), class_tokens=None,
                       captions=replace(captions, wildcard=self._several_lines(entry)))  # fmt: skip

    def _several_lines(self, entry: Entry) -> bool:
        if entry.switch("disable_multiline_split"):
            self.notes.add("disable_multiline_split: the first line of a caption file is the caption", entry)
            return False
        self.notes.add("one line of each .txt file is picked at random as the caption, as is one of {a|b}", entry)
        return True

    def _prefix(self, entry: Entry, prompts: list[str]) -> str:
        if not entry.switch("prepend_instance_prompt"):
            if prompts:
                self.notes.add("instance_prompt is not used without prepend_ or only_instance_prompt", entry)
            return ""
        if len(prompts) != 1:
            entry.reject("prepend_instance_prompt", "needs one instance_prompt", "write one text as instance_prompt")
            return ""
        return prompts[0]

    def _shuffled(self, entry: Entry) -> CaptionSettings:
        captions = replace(self.base.captions, shuffle=False, keep_tokens=0)
        inner = entry.table("caption_shuffle", ("enable", "count", "seed", "split_on", "position_start",
                                                "include_original"))  # fmt: skip
        if inner is None:
            return self.base.captions
        if not inner.switch("enable"):
            return captions
        self.notes.add("caption_shuffle: shuffled each time, not in a fixed number of variants", entry)
        kept = inner.number("position_start") or 0
        if kept < 0 or kept != int(kept):
            inner.reject("position_start", "is not a whole number of at least 0", "write how many tags stay in place")
            kept = 0
        separator = SEPARATORS[inner.choice("split_on", tuple(SEPARATORS)) or "comma"]
        return replace(captions, shuffle=True, keep_tokens=int(kept), separator=separator)
