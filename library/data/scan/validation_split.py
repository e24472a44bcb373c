"""Which images are set aside and not trained on, so that the loss on them tells learning from memorising.

The choice is that of kohya's sd-scripts for the same validation_seed: the sorted names of a folder are shuffled, the
first ceil(N (1 - share)) are trained on, the rest is set aside. (There the rest is rounded by itself, so that an image
may be on both sides.) It depends on seed and names alone. An image that is trained on under another name or in another
dataset is no new one: it is not validated on either. Two are the same if their files have the same bytes; crops, copies
of another size and other formats of one photo are not recognised.
"""

from __future__ import annotations

import hashlib
import math
import random
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from library.options.datasets import DatasetSpec, SubsetSpec
from library.options.mistakes import Mistake

if TYPE_CHECKING:
    from library.data.scan.scan import ImageRecord

_HEAD = 1 << 16  # bytes that mostly tell two files apart


@dataclass
class Split:
    """Both sides, in the order of the records, and what the user should know."""

    trained: list[ImageRecord] = field(default_factory=list)
    held_out: list[ImageRecord] = field(default_factory=list)  # each once, whatever its repeats
    notes: list[str] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)


def split(
    train: Sequence[ImageRecord],
    reg: Sequence[ImageRecord],
    datasets: Sequence[DatasetSpec],
    subsets: Sequence[SubsetSpec],
    length: Callable[[ImageRecord], int],
    seed: int,
) -> Split:
    """Set aside what the datasets ask for. Regularisation images stay; `length` is an image's file in bytes, `seed`
    counts for datasets without a seed of their own."""
    asking = [place for place, dataset in enumerate(datasets) if dataset.validation_split > 0]
    if not train or not asking:
        return Split(trained=list(train))
    found = Split()
    by_subset: dict[int, list[ImageRecord]] = {}
    for record in train:
        by_subset.setdefault(record.subset, []).append(record)
    for number, records in by_subset.items():
        dataset = datasets[records[0].dataset]
        names = [f"{record.name}\0{record.folder.name}" for record in records]
        own_seed = seed if dataset.validation_seed is None else dataset.validation_seed
        aside = set_aside(names, dataset.validation_split, own_seed)
        if dataset.validation_split > 0 and not aside:
            found.notes.append(
                f"{_said(dataset)} sets nothing aside of {_title(subsets[number])} ({len(records)} images)"
            )
        for place, record in enumerate(records):
            if place in aside:
                found.held_out.append(replace(record, repeats=1, held_out=True))
            else:
                found.trained.append(record)
    copies = also_trained(found.held_out, [*found.trained, *reg], length)
    _judge(found, reg, [datasets[place] for place in asking], by_subset, copies, datasets)
    found.held_out = [record for place, record in enumerate(found.held_out) if place not in copies]
    return found


def set_aside(names: Sequence[str], share: float, seed: int) -> set[int]:
    """Places of the images that are not trained on, floor(N share) of them."""
    order = sorted(range(len(names)), key=lambda place: unicodedata.normalize("NFC", names[place]))
    random.Random(seed).shuffle(order)
    # as it was written: in floating point 100 (1 - 0.41) is a little more than 59
    return set(order[math.ceil(len(names) * (1 - Fraction(str(share)))) :])


def also_trained(
    held_out: Sequence[ImageRecord], trained: Sequence[ImageRecord], length: Callable[[ImageRecord], int]
) -> set[int]:
    """Places of held-out images whose bytes are those of one that is trained on. Only files of equal length and size
    in pixels are read, and mostly their beginnings."""
    paths = {record.path for record in trained}
    same = {place for place, record in enumerate(held_out) if record.path in paths}
    ours = {place: record for place, record in enumerate(held_out) if place not in same}
    theirs = list(trained)
    # each look is dearer than the one before, and is taken only where that one saw no difference
    for look in (lambda record: (length(record), record.size), _beginning, _whole):
        of_ours = {place: look(record) for place, record in ours.items()}
        of_theirs = [look(record) for record in theirs]
        shared = set(of_ours.values()) & set(of_theirs)
        ours = {place: record for place, record in ours.items() if of_ours[place] in shared}
        theirs = [record for record, seen in zip(theirs, of_theirs, strict=True) if seen in shared]
    return same | set(ours)


def _beginning(record: ImageRecord) -> str:
    return _digest(record.path, _HEAD)


def _whole(record: ImageRecord) -> str:
    return _digest(record.path, None)


def _digest(path: Path, most: int | None) -> str:
    """Of the file's first bytes, or of all; what cannot be read is like nothing else."""
    try:
        with path.open("rb") as file:
            digest = hashlib.blake2b(file.read(most)) if most else hashlib.file_digest(file, "blake2b")
        return digest.hexdigest()
    except OSError:
        return str(path)


def _judge(
    found: Split,
    reg: Sequence[ImageRecord],
    asking: Sequence[DatasetSpec],
    by_subset: dict[int, list[ImageRecord]],
    copies: set[int],
    datasets: Sequence[DatasetSpec],
) -> None:
    """What is wrong with a split, and what of it is told."""
    said = " and ".join(dict.fromkeys(_said(dataset) for dataset in asking))
    if not found.trained:
        remedy = "set less than 1, or add a dataset that is trained on"
        found.mistakes.append(Mistake(f"{said} leaves no image to train on", remedy))
        return
    trained_in = {record.dataset for record in found.trained}
    for place in sorted({record.dataset for record in found.held_out} - trained_in):
        if any(record.dataset == place for record in reg):
            what = f"{_said(datasets[place])} leaves regularisation images without training images beside them"
            found.mistakes.append(Mistake(what, "set less than 1, or take the regularisation images out there"))
    if not found.held_out:
        most = max(len(records) for records in by_subset.values() if datasets[records[0].dataset] in asking)
        remedy = f"{math.ceil(100 / most) / 100:g} sets aside one of the largest folder's {most}"
        found.mistakes.append(Mistake(f"{said} sets no image aside", f"{remedy} images; or leave it out"))
    elif len(copies) == len(found.held_out):
        what = f"{said}: every image that is set aside is trained on too, as the same file or as a copy"
        found.mistakes.append(Mistake(what, "give other images to validate on, or leave it out"))
    elif copies:
        names = ", ".join(str(found.held_out[place].path) for place in sorted(copies)[:5])
        more = ", ..." if len(copies) > 5 else ""
        what = f"{len(copies)} images that were set aside for validation are also trained on, as the same file or as"
        found.notes.append(f"{what} a copy, and so are not validated on: {names}{more}")


def _said(dataset: DatasetSpec) -> str:
    return f"validation_split = {dataset.validation_split:g} ({dataset.origin})"


def _title(subset: SubsetSpec) -> str:
    return str(subset.image_dir or subset.metadata_file)
