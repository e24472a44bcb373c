"""Hold out images for validation, so that their loss shows overfitting: those of validation subsets, and a share of the
others.

The share selects the images that kohya's sd-scripts selects with the same validation_seed: the sorted names of a folder
are shuffled, the first ceil(N (1 - split)) are trained on and the rest are held out. (sd-scripts rounds the rest
separately, so an image may be on both sides.) The selection depends only on seed and names. An image that is also
trained on, in another dataset or under another name, is not validated on. Files with equal bytes are the same image;
crops, resized copies and other formats are not recognised.
"""

from __future__ import annotations

import hashlib
import math
import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from library.messages import counted, listed
from library.options.datasets import DatasetSpec, SubsetSpec
from library.options.mistakes import Mistake

if TYPE_CHECKING:
    from library.data.image_files import ImageSource
    from library.data.scan.image_record import ImageRecord

_HEAD = 1 << 16  # bytes that usually distinguish two files


@dataclass
class Split:
    """Trained and held-out records, in order, with notes and mistakes."""

    trained: list[ImageRecord] = field(default_factory=list)
    held_out: list[ImageRecord] = field(default_factory=list)  # each with 1 repeat
    notes: list[str] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)


def split(
    train: Sequence[ImageRecord],
    reg: Sequence[ImageRecord],
    validation: Sequence[ImageRecord],
    datasets: Sequence[DatasetSpec],
    subsets: Sequence[SubsetSpec],
    seed: int,
) -> Split:
    """Hold out the images of validation subsets, and others as each dataset's validation_split says. Regularisation
    images are only held out by their subset; `seed` is that of datasets without their own validation_seed."""
    splitting = [place for place, dataset in enumerate(datasets) if dataset.validation_split > 0]
    if not validation and (not train or not splitting):
        return Split(trained=list(train))
    result = Split(held_out=[replace(record, repeats=1, held_out=True) for record in validation])
    by_subset: dict[int, list[ImageRecord]] = {}
    for record in train:
        by_subset.setdefault(record.subset, []).append(record)
    for number, records in by_subset.items():
        dataset = datasets[records[0].dataset]
        names = [f"{record.name}\0{record.folder.name}" for record in records]
        own_seed = seed if dataset.validation_seed is None else dataset.validation_seed
        held_out = choose_held_out(names, dataset.validation_split, own_seed)
        if dataset.validation_split > 0 and not held_out:
            count = "the only image" if len(records) == 1 else f"any of the {len(records)} images"
            result.notes.append(f"{_setting(dataset)} does not hold out {count} of {subsets[number].source}")
        for place, record in enumerate(records):
            if place in held_out:
                result.held_out.append(replace(record, repeats=1, held_out=True))
            else:
                result.trained.append(record)
    result.held_out.sort(key=lambda record: record.subset)
    copies = find_trained_copies(result.held_out, [*result.trained, *reg])
    settings = [_setting(datasets[place]) for place in splitting]
    settings += [f"validation subset ({subset.origin})" for subset in subsets if subset.validation]
    if train or all(subset.validation or subset.is_reg for subset in subsets):  # else a folder without images is known
        _check_split(result, reg, " and ".join(dict.fromkeys(settings)), by_subset, copies, datasets)
    result.held_out = [record for place, record in enumerate(result.held_out) if place not in copies]
    return result


def choose_held_out(names: Sequence[str], share: float, seed: int) -> set[int]:
    """Indexes of the held-out images: floor(N share)."""
    order = sorted(range(len(names)), key=lambda place: unicodedata.normalize("NFC", names[place]))
    random.Random(seed).shuffle(order)
    # exact: in floating point, 100 (1 - 0.41) is slightly more than 59
    return set(order[math.ceil(len(names) * (1 - Fraction(str(share)))) :])


def find_trained_copies(held_out: Sequence[ImageRecord], trained: Sequence[ImageRecord]) -> set[int]:
    """Indexes of the held-out images with the same bytes as a trained one. Reads only files of equal length and size
    in pixels, and usually only their beginnings."""
    paths = {record.path for record in trained}
    same = {place for place, record in enumerate(held_out) if record.path in paths}
    candidates = {place: record for place, record in enumerate(held_out) if place not in same}
    others = list(trained)
    # each comparison costs more than the one before, and is made only where that one result no difference
    for signature in (lambda record: (record.length, record.size), _beginning, _content):
        candidate_signatures = {place: signature(record) for place, record in candidates.items()}
        other_signatures = [signature(record) for record in others]
        shared = set(candidate_signatures.values()) & set(other_signatures)
        candidates = {place: record for place, record in candidates.items() if candidate_signatures[place] in shared}
        others = [record for record, seen in zip(others, other_signatures, strict=True) if seen in shared]
    return same | set(candidates)


def _beginning(record: ImageRecord) -> str:
    return _digest(record.path, _HEAD)


def _content(record: ImageRecord) -> str:
    return _digest(record.path, None)


def _digest(path: ImageSource, most: int | None) -> str:
    """Hash of the first `most` bytes, or of all; an unreadable file gets its path, which equals no hash."""
    try:
        with path.open("rb") as file:
            digest = hashlib.blake2b(file.read(most)) if most else hashlib.file_digest(file, "blake2b")
        return digest.hexdigest()
    except OSError:
        return str(path)


def _check_split(
    result: Split,
    reg: Sequence[ImageRecord],
    settings: str,
    by_subset: dict[int, list[ImageRecord]],
    copies: set[int],
    datasets: Sequence[DatasetSpec],
) -> None:
    """Add the mistakes and notes of a split. `settings`: what holds images out."""
    if not result.trained:
        remedy = "set it below 1, or add a dataset to train on" if by_subset else "add a subset to train on"
        result.mistakes.append(Mistake(f"{settings} leaves no image to train on", remedy))
        return
    trained_in = {record.dataset for record in result.trained}
    for place in sorted({record.dataset for record in result.held_out} - trained_in):
        if datasets[place].validation_split > 0 and any(record.dataset == place for record in reg):
            what = f"{_setting(datasets[place])} leaves regularisation images without training images"
            result.mistakes.append(Mistake(what, "set it below 1, or remove the regularisation images of that dataset"))
    if not result.held_out:
        sizes = [len(records) for records in by_subset.values() if datasets[records[0].dataset].validation_split > 0]
        most = max(sizes, default=1)
        share = f"set at least {math.ceil(100 / most) / 100:g}"
        remedy = f"{share}, to hold out 1 of {counted(most, 'image')} of the largest folder"
        result.mistakes.append(Mistake(f"{settings} holds out no image", f"{remedy}; or remove it"))
    elif len(copies) == len(result.held_out):
        what = f"{settings}: every held-out image is also trained on, as the same file or a copy"
        result.mistakes.append(Mistake(what, "remove the copies from the training data, or hold out no images"))
    elif copies:
        what = f"{counted(len(copies), 'held-out image')} also trained on (same file or copy), so not validated on"
        result.notes.append(f"{what}: {listed((result.held_out[place].path for place in sorted(copies)), 5)}")


def _setting(dataset: DatasetSpec) -> str:
    return f"validation_split = {dataset.validation_split:g} ({dataset.origin})"
