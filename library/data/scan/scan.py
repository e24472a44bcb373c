"""Scan the folders of all datasets into image records.

Anything that would silently train on the wrong data (no image, captions with another extension, damaged images) is a
mistake. Reads only image headers, and only those that changed since an earlier scan. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from library.data.image_files import readable_extensions, too_large
from library.data.scan.balance import balance, balance_note
from library.data.scan.caption_files import lines_of
from library.data.scan.empty_captions import check_captions
from library.data.scan.file_contents import Contents, ReadRequests
from library.data.scan.gather import (
    Gathered,
    ImageFile,
    caption_endings,
    check_caption_endings,
    check_masks,
    gather,
)
from library.data.scan.image_headers import Header
from library.data.scan.image_notes import note_images
from library.data.scan.image_record import ImageRecord
from library.data.scan.index import Index
from library.data.scan.listing import Directories
from library.data.scan.mask_files import same_aspect_ratio
from library.data.scan.shard_images import ShardImages, default_caption, describe_loose, describe_masks, open_all
from library.data.scan.validation_split import split
from library.data.shards.table import Row
from library.messages import counted
from library.options.convert_values import is_remote
from library.options.datasets import DatasetSpec, Size, SubsetSpec
from library.options.groups.dataset import DatasetOptions
from library.options.mistakes import Mistake, UserError

_MOST_BAD = 0.1  # share of unusable images above which a run stops
_LISTED = 20  # files named in a mistake


@dataclass(frozen=True)
class Scan:
    """Result of a scan: training, then regularisation records, each by dataset and subset and sorted by name."""

    datasets: tuple[DatasetSpec, ...] = ()
    subsets: tuple[SubsetSpec, ...] = ()  # of all datasets, in order
    records: Sequence[ImageRecord] = ()
    held_out: Sequence[ImageRecord] = ()  # only validated on; by dataset and subset, sorted by name
    bad_images: tuple[tuple[object, str], ...] = ()  # path, reason
    left_out_reg: int = 0  # regularisation images left out by balancing
    left_out_small: int = 0  # images below the minimum size of their subset
    found_reg_samples: int = 0  # regularisation images x repeats before balancing
    without_mask: int = 0  # images without a mask file in subsets with masks
    notes: tuple[str, ...] = ()
    mistakes: tuple[Mistake, ...] = ()
    shards: Mapping[int, ShardImages] = field(default_factory=dict)  # by the number of the subset

    @property
    def train_samples(self) -> int:
        """Training images x repeats."""
        return sum(record.repeats for record in self.records if not record.is_reg)

    @property
    def reg_samples(self) -> int:
        """Regularisation images x repeats after balancing."""
        return sum(record.repeats for record in self.records if record.is_reg)


@dataclass
class _Findings:
    bad: dict[object, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    left_out_small: int = 0
    without_mask: int = 0
    sizes: dict[Size, Size] = field(default_factory=dict)  # equal sizes and captions share one object
    texts: dict[str, str] = field(default_factory=dict)


def scan(
    datasets: Sequence[DatasetSpec],
    index: Path | None = None,
    *,
    progress: bool = False,
    seed: int = 0,
    most_memory: float = DatasetOptions.max_image_memory,
    caches: Path | None = None,
) -> Scan:
    """List the images, captions and masks of the datasets. Collects mistakes instead of raising them.

    `index`: folder of the index kept between scans, None for no index. `progress` shows a bar if the scan takes longer
    than a second. `seed` selects the held-out images of datasets without their own validation_seed. `most_memory`: GiB
    that a decoded image may need. `caches`: folder of what cannot be beside images in shards; None: beside the shards.
    """
    findings = _Findings()
    subsets = [(place, subset) for place, dataset in enumerate(datasets) for subset in dataset.subsets]
    shards, without_folder, mistakes = open_all(subsets, _find_duplicates(datasets, findings), caches)
    findings.mistakes += mistakes
    specs = [shards[n].subset if n in shards else subset for n, (_, subset) in enumerate(subsets)]
    with Index(index) as stored:  # opened before listing: it ignores files modified just before it was opened
        directories = Directories(readable_extensions(), caption_endings(specs))
        gathered = _gather_all(specs, without_folder, directories)
        contents = _read(gathered, stored, most_memory, progress=progress)
        trouble = stored.trouble
    records = [
        _build_from_shards(shards[number], most_memory, findings)
        if number in shards
        else _build_records(number, subsets[number][0], subset, gathered[number], contents, findings)
        for number, subset in enumerate(specs)
    ]
    train, reg, validation = _by_use(specs, records)
    _check_bad(findings, train + reg + validation)
    sides = split(train, reg, validation, datasets, specs, seed)
    findings.notes += sides.notes
    findings.mistakes += sides.mistakes
    balanced = _balance(datasets, sides.trained, reg, findings)
    kept = sides.trained + balanced
    findings.notes += note_images(kept, specs)
    if not findings.mistakes and (mistake := check_captions(kept, specs)) is not None:
        findings.mistakes.append(mistake)
    if trouble:
        what = f"the index in {index} cannot be used ({trouble})"
        findings.notes.append(f"{what}: every start reads all image headers again")
    return Scan(
        datasets=tuple(datasets),
        subsets=tuple(specs),
        records=tuple(kept),
        held_out=tuple(sides.held_out),
        bad_images=tuple(findings.bad.items()),
        left_out_reg=len(reg) - len(balanced),
        left_out_small=findings.left_out_small,
        found_reg_samples=sum(record.repeats for record in reg),
        without_mask=findings.without_mask,
        notes=tuple(dict.fromkeys(findings.notes)),
        mistakes=tuple(dict.fromkeys(findings.mistakes)),
        shards=shards,
    )


def _gather_all(
    subsets: Sequence[SubsetSpec], without_folder: Collection[int], directories: Directories
) -> list[Gathered]:
    """The files of each subset; of those without a folder none."""
    extensions = readable_extensions()
    gathered = [
        Gathered() if number in without_folder else gather(subset, directories, extensions)
        for number, subset in enumerate(subsets)
    ]
    check_masks(subsets, gathered)
    check_caption_endings(subsets, gathered)
    return gathered


def _by_use(
    subsets: Sequence[SubsetSpec], records: Sequence[list[ImageRecord]]
) -> tuple[list[ImageRecord], list[ImageRecord], list[ImageRecord]]:
    """The records of each subset, as those that are trained, regularisation images, and those that are validated on."""
    train, reg, validation = list[ImageRecord](), list[ImageRecord](), list[ImageRecord]()
    for subset, found in zip(subsets, records, strict=True):
        (validation if subset.validation else reg if subset.is_reg else train).extend(found)
    return train, reg, validation


def _find_duplicates(datasets: Sequence[DatasetSpec], findings: _Findings) -> set[int]:
    """Subsets with the folder or metadata file of an earlier subset of their dataset: skipped as in sd-scripts."""
    duplicates: set[int] = set()
    number = 0
    for dataset in datasets:
        seen: dict[str, SubsetSpec] = {}
        for subset in dataset.subsets:
            source = subset.metadata_file or subset.source
            name = source if isinstance(source, str) and is_remote(source) else os.path.realpath(source)
            first = seen.setdefault(name, subset) if source else subset
            if first is not subset:
                what = f"{source} occurs twice in one dataset ({first.origin} and {subset.origin})"
                if (first.is_reg, first.validation) != (subset.is_reg, subset.validation):
                    remedy = "use it for one of training, regularisation and validation"
                    findings.mistakes.append(Mistake(what, remedy))
                else:
                    findings.notes.append(f"{what}; the second is skipped")
                duplicates.add(number)
            number += 1
    return duplicates


def _read(gathered: Iterable[Gathered], index: Index, most_memory: float, *, progress: bool) -> Contents:
    """Read the headers of all images and masks, and all caption files."""
    requests = ReadRequests(most_memory)
    for subset_files in gathered:
        for images in _by_directory(subset_files.images).values():
            directory = images[0].directory
            requests.add_images(directory, [image.base for image in images])
            names = [image.caption_file for image in images if image.caption_file is not None]
            if names:
                requests.add_captions(directory, names, subset_files.reading)
        for directory, base in subset_files.mask_places.values():
            requests.add_images(directory, [base])
    return requests.read(index, progress=progress)


def _by_directory(images: Iterable[ImageFile]) -> dict[str, list[ImageFile]]:
    groups: dict[str, list[ImageFile]] = {}
    for image in images:
        groups.setdefault(image.directory.path, []).append(image)
    return groups


def _build_records(
    number: int, place: int, subset: SubsetSpec, gathered: Gathered, contents: Contents, findings: _Findings
) -> list[ImageRecord]:
    findings.notes += gathered.notes
    findings.mistakes += gathered.mistakes
    findings.bad.update(gathered.unusable)
    records: list[ImageRecord] = []
    small = later_lines = 0
    unusable_masks: dict[str, str] = {}  # mask -> reason
    for image in gathered.images:
        header = contents.headers[image.directory.path][image.base]
        if not isinstance(header, Header):
            findings.bad[image.folder / image.name] = header
            continue
        size = findings.sizes.setdefault(header.size, header.size)
        if _is_small(size, subset):
            small += 1
            continue
        caption, from_file = image.text, True
        if image.caption_file is not None:
            text = contents.captions[image.directory.path, gathered.reading][image.caption_file]
            if isinstance(text, UserError):
                findings.mistakes.extend(text.mistakes)
                continue
            caption = text[0]
            later_lines += text[1]
        elif not caption:
            caption, from_file = default_caption(subset, image.base), False
        mask = gathered.masks.get(image.name)
        if mask == image.name:
            mask = image.name  # share one object
        findings.without_mask += subset.mask_dir is not None and mask is None
        if mask is not None and (reason := _mask_problem(mask, size, gathered, contents)) is not None:
            unusable_masks[mask] = reason
        caption = findings.texts.setdefault(caption, caption)
        records.append(
            ImageRecord(
                image.folder, image.name, number, place, size, caption, from_file, subset.repeats, subset.is_reg,
                header.transparent, mask, score=subset.score if image.score is None else image.score,
                profile=header.profile,
                animated=header.animated, length=image.directory.images[image.base][0],
            )
        )  # fmt: skip
    _note_lines(later_lines, subset, findings)
    if unusable_masks:
        findings.mistakes.append(_unusable_masks(subset, unusable_masks))
    if small:
        _report_small(small, subset, is_all=not records, findings=findings)
    return records


def _build_from_shards(images: ShardImages, most_memory: float, findings: _Findings) -> list[ImageRecord]:
    """The records of the images in shards, by their table."""
    subset = images.subset
    records: list[ImageRecord] = []
    small = later_lines = 0
    for record, row in _rows_of(images, findings):
        if (reason := too_large(record.size, most_memory)) is not None:
            findings.bad[record.path] = reason
        elif _is_small(record.size, subset):
            small += 1
        else:
            several = row.caption is not None and record.from_file and not subset.captions.wildcard
            later_lines += several and lines_of(row.caption or "")[1]
            findings.without_mask += images.masks and record.mask is None
            records.append(record)
    _note_lines(later_lines, subset, findings)
    if small:
        _report_small(small, subset, is_all=not records, findings=findings)
    notes, mistakes = describe_masks(images)
    findings.notes += notes + describe_loose(images, readable_extensions())
    findings.mistakes += mistakes
    if not records and not small and not findings.mistakes:
        findings.mistakes.append(Mistake(f"the shards of {subset.source} contain no image", "name others"))
    return records


def _rows_of(images: ShardImages, findings: _Findings) -> Iterator[tuple[ImageRecord, Row]]:
    """The records with their rows, until one that no table has."""
    try:
        for number, row in images.rows():
            yield images.record(number, row), row
    except UserError as error:
        findings.mistakes += error.mistakes


def _is_small(size: Size, subset: SubsetSpec) -> bool:
    return min(size) < subset.least_edge or size[0] * size[1] < subset.least_area


def _note_lines(later_lines: int, subset: SubsetSpec, findings: _Findings) -> None:
    if later_lines:
        files = counted(later_lines, "caption file")
        findings.notes.append(f"{subset.source}: {files} with several lines; only the first line is used")


def _mask_problem(mask: str, size: Size, gathered: Gathered, contents: Contents) -> str | None:
    """Why a mask cannot be used for an image of `size`; None if it can."""
    directory, base = gathered.mask_places[mask]
    header = contents.headers[directory.path][base]
    if not isinstance(header, Header):
        return header
    if same_aspect_ratio(header.size, size):
        return None
    return f"its size is {header.size[0]}x{header.size[1]}, its image's {size[0]}x{size[1]}"


def _unusable_masks(subset: SubsetSpec, reasons: Mapping[str, str]) -> Mistake:
    what = f"{counted(len(reasons), 'mask')} in {subset.mask_dir} cannot be used:\n{_with_reasons(reasons)}"
    return Mistake(what, "resize each mask to the size or aspect ratio of its upright image, or remove it")


def _with_reasons(reasons: Mapping[Any, str]) -> str:
    """An indented line per file, and how many more there are."""
    lines = [f"  {file}: {reason}" for file, reason in reasons.items()]
    more = [f"  and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return "\n".join(lines[:_LISTED] + more)


def _report_small(small: int, subset: SubsetSpec, *, is_all: bool, findings: _Findings) -> None:
    findings.left_out_small += small
    edge = f"a side below {subset.least_edge} pixels" if subset.least_edge else ""
    area = f"fewer than {subset.least_area} pixels" if subset.least_area else ""
    reason = " or ".join(filter(None, (edge, area)))
    if is_all:
        images = "the only image has" if small == 1 else f"all {small} images have"
        what = f"{subset.source}: {images} {reason} ({subset.origin})"
        findings.mistakes.append(Mistake(what, "lower the minimum size, or use larger images"))
    else:
        findings.notes.append(f"{subset.source}: {counted(small, 'image')} with {reason} left out")


def _check_bad(findings: _Findings, records: Sequence[ImageRecord]) -> None:
    if not findings.bad:
        return
    total = len(findings.bad) + len({(record.folder, record.name) for record in records})
    if len(findings.bad) > _MOST_BAD * total:
        what = f"{len(findings.bad)} of {counted(total, 'image')} cannot be used, more than {_MOST_BAD:.0%}"
        findings.mistakes.append(Mistake(f"{what}:\n{_with_reasons(findings.bad)}", "repair or remove them"))


def _balance(
    datasets: Sequence[DatasetSpec], train: list[ImageRecord], reg: list[ImageRecord], findings: _Findings
) -> list[ImageRecord]:
    """Give each dataset as many regularisation samples as training samples."""
    balanced: list[ImageRecord] = []
    for place, dataset in enumerate(datasets):
        records = [record for record in reg if record.dataset == place]
        target = sum(record.repeats for record in train if record.dataset == place)
        if not records:
            continue
        if not target:
            balanced += records
            if train:
                findings.notes.append(f"{dataset.origin}: only regularisation images, which keep their repeats")
            continue
        repeats = balance([record.repeats for record in records], [record.subset for record in records], target)
        kept = [replace(record, repeats=repeats[index]) for index, record in enumerate(records) if index in repeats]
        name = f" of {dataset.origin}" if len(datasets) > 1 else ""
        findings.notes.append(balance_note(name, records, kept, target))
        balanced += kept
    return balanced
