"""Read the folders of all datasets: what there is to train on.

Whatever would silently train on something else than meant (no image, captions under another ending, damaged
images) is a mistake. No torch here; only headers of images are read, and of those that have not changed since an
earlier scan not even these.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from library.data.scan.balance import balance
from library.data.scan.file_contents import Contents, Wanted
from library.data.scan.gather import Gathered, ImageFile, caption_endings, gather, judge_masks, title
from library.data.scan.image_headers import Header, readable_extensions
from library.data.scan.index import Index
from library.data.scan.listing import Directories, stem
from library.data.scan.mask_files import same_proportion
from library.data.scan.validation_split import split
from library.options.datasets import DatasetSpec, Size, SubsetSpec
from library.options.mistakes import Mistake, UserError

_BAD_SHARE = 0.1
_NAMED = 20  # files that a mistake names
_WHITE = (255, 255, 255)


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image to train on.

    `key` names it in every random draw: kind, folder and file name. Unlike an index it stays when an image is added
    to or taken from the data, when the data moves, and on another system's sort order.
    """

    folder: Path  # one object shared by all images of the folder
    name: str  # its path in `folder`, "/" between the parts
    subset: int  # index in Scan.subsets
    dataset: int  # index in Scan.datasets
    size: Size  # width, height, upright
    caption: str  # raw; several lines only where the subset's captions have wildcards
    from_file: bool  # the caption comes from a file, not from class tokens or the image's name
    repeats: int
    is_reg: bool
    transparent: bool = False
    mask: str | None = None  # the path of its mask in the subset's mask_dir
    held_out: bool = False  # set aside for validation
    score: float | None = None  # aesthetic score, 0 to 10, of its metadata or its subset; None: the run's

    @property
    def path(self) -> Path:
        """Where the image lies."""
        return self.folder / self.name

    @property
    def key(self) -> str:
        """Its name in random draws."""
        kind = "reg" if self.is_reg else "train"
        return unicodedata.normalize("NFC", f"{kind}/{self.folder.name}/{self.name}")


@dataclass(frozen=True)
class Scan:
    """What a scan found: training records first, both kinds by dataset and subset and sorted by name in them."""

    datasets: tuple[DatasetSpec, ...] = ()
    subsets: tuple[SubsetSpec, ...] = ()  # of all datasets in their order
    records: tuple[ImageRecord, ...] = ()
    held_out: tuple[ImageRecord, ...] = ()  # set aside for validation, by dataset and subset and sorted by name
    bad_images: tuple[tuple[Path, str], ...] = ()  # path, why
    left_out_reg: int = 0  # regularisation images that balancing did not need
    left_out_small: int = 0  # images below the least size of their subset
    found_reg_samples: int = 0  # regularisation images x repeats before balancing
    without_mask: int = 0  # images of subsets with masks that have no file: transparency is their mask, or nothing
    notes: tuple[str, ...] = ()
    mistakes: tuple[Mistake, ...] = ()

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
    bad: dict[Path, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    left_out_small: int = 0
    without_mask: int = 0
    sizes: dict[Size, Size] = field(default_factory=dict)  # equal sizes and captions are one object in all records
    texts: dict[str, str] = field(default_factory=dict)


def scan(datasets: Sequence[DatasetSpec], index: Path | None = None, *, progress: bool = False, seed: int = 0) -> Scan:
    """Read the images, captions and masks of the datasets. Mistakes of the user are collected, not raised.

    `index`: a folder for what is remembered between scans; None: nothing is. `progress` shows a bar when it takes
    longer than a second. `seed` chooses what is set aside for validation where a dataset has no seed of its own.
    """
    found = _Findings()
    subsets = [(place, subset) for place, dataset in enumerate(datasets) for subset in dataset.subsets]
    extensions = readable_extensions()
    with Index(index) as remembered:  # opened first: it judges times of change by when the listing began
        directories = Directories(extensions, caption_endings([subset for _, subset in subsets]))
        twice = _given_twice(datasets, found)
        gathered = [
            Gathered() if number in twice else gather(subset, directories, extensions)
            for number, (_, subset) in enumerate(subsets)
        ]
        judge_masks([subset for _, subset in subsets], gathered)
        contents = _read(gathered, remembered, progress=progress)
        trouble = remembered.trouble
    train: list[ImageRecord] = []
    reg: list[ImageRecord] = []
    for number, (place, subset) in enumerate(subsets):
        records = _records(number, place, subset, gathered[number], contents, found)
        (reg if subset.is_reg else train).extend(records)
    _judge_bad_images(found, train + reg)
    sides = split(train, reg, datasets, [subset for _, subset in subsets], _lengths(gathered), seed)
    found.notes += sides.notes
    found.mistakes += sides.mistakes
    balanced = _balance(datasets, sides.trained, reg, found)
    kept = sides.trained + balanced
    _note_contents(found.notes, kept, [subset for _, subset in subsets])
    if trouble:
        found.notes.append(f"sizes of images are not remembered in {index} ({trouble}): every start reads all anew")
    return Scan(
        datasets=tuple(datasets),
        subsets=tuple(subset for _, subset in subsets),
        records=tuple(kept),
        held_out=tuple(sides.held_out),
        bad_images=tuple(found.bad.items()),
        left_out_reg=len(reg) - len(balanced),
        left_out_small=found.left_out_small,
        found_reg_samples=sum(record.repeats for record in reg),
        without_mask=found.without_mask,
        notes=tuple(dict.fromkeys(found.notes)),
        mistakes=tuple(dict.fromkeys(found.mistakes)),
    )


def _given_twice(datasets: Sequence[DatasetSpec], found: _Findings) -> set[int]:
    """Subsets whose folder or metadata file an earlier one of their dataset has: left out, as in sd-scripts."""
    twice: set[int] = set()
    number = 0
    for dataset in datasets:
        seen: dict[str, SubsetSpec] = {}
        for subset in dataset.subsets:
            source = subset.metadata_file or subset.image_dir
            first = seen.setdefault(os.path.realpath(source), subset) if source is not None else subset
            if first is not subset:
                what = f"{source} is given twice in one dataset ({first.origin} and {subset.origin})"
                if first.is_reg != subset.is_reg:
                    remedy = "it holds images either for training or for regularisation: give it once"
                    found.mistakes.append(Mistake(what, remedy))
                else:
                    found.notes.append(f"{what}: the later one is not used")
                twice.add(number)
            number += 1
    return twice


def _lengths(gathered: Sequence[Gathered]) -> Callable[[ImageRecord], int]:
    """How many bytes the file of a record has, as its folder was listed."""

    @cache
    def of_subset(number: int) -> dict[tuple[Path, str], int]:
        images = gathered[number].images
        return {(image.folder, image.name): image.directory.images[image.base][0] for image in images}

    return lambda record: of_subset(record.subset)[record.folder, record.name]


def _read(gathered: Iterable[Gathered], remembered: Index, *, progress: bool) -> Contents:
    wanted = Wanted()
    for found in gathered:
        for images in _by_directory(found.images).values():
            listed = images[0].directory
            wanted.image(listed, [image.base for image in images])
            names = [image.caption_file for image in images if image.caption_file is not None]
            if names:
                wanted.captions(listed, names, found.reading)
        for directory, base in found.mask_places.values():
            wanted.image(directory, [base])
    return wanted.read(remembered, progress=progress)


def _by_directory(images: Iterable[ImageFile]) -> dict[str, list[ImageFile]]:
    together: dict[str, list[ImageFile]] = {}
    for image in images:
        together.setdefault(image.directory.path, []).append(image)
    return together


def _records(
    number: int, place: int, subset: SubsetSpec, gathered: Gathered, contents: Contents, found: _Findings
) -> list[ImageRecord]:
    found.notes += gathered.notes
    found.mistakes += gathered.mistakes
    found.bad.update(gathered.lost)
    records: list[ImageRecord] = []
    small = later_lines = 0
    unfit: dict[str, str] = {}  # masks, and why
    for image in gathered.images:
        header = contents.headers[image.directory.path][image.base]
        if not isinstance(header, Header):
            found.bad[image.folder / image.name] = header
            continue
        size = found.sizes.setdefault(header.size, header.size)
        if min(size) < subset.least_edge or size[0] * size[1] < subset.least_area:
            small += 1
            continue
        caption, from_file = image.text, True
        if image.caption_file is not None:
            text = contents.captions[image.directory.path, gathered.reading][image.caption_file]
            if isinstance(text, UserError):
                found.mistakes.extend(text.mistakes)
                continue
            caption = text[0]
            later_lines += text[1]
        elif not caption:
            caption, from_file = _without_file(subset, image.base), False
        mask = gathered.masks.get(image.name)
        if mask == image.name:
            mask = image.name  # one object
        found.without_mask += subset.mask_dir is not None and mask is None
        if mask is not None and (why := _unfit(mask, size, gathered, contents)) is not None:
            unfit[mask] = why
        caption = found.texts.setdefault(caption, caption)
        records.append(
            ImageRecord(
                image.folder, image.name, number, place, size, caption, from_file, subset.repeats, subset.is_reg,
                header.transparent, mask, score=subset.score if image.score is None else image.score,
            )
        )  # fmt: skip
    if later_lines:
        found.notes.append(f"{title(subset)}: {later_lines} caption files have more lines; only the first line is used")
    if unfit:
        found.mistakes.append(_unfit_masks(subset, unfit))
    if small:
        _tell_small(small, subset, all_of_them=not records, found=found)
    return records


def _unfit(mask: str, size: Size, gathered: Gathered, contents: Contents) -> str | None:
    """Why a mask cannot be that of an image of `size`."""
    directory, base = gathered.mask_places[mask]
    header = contents.headers[directory.path][base]
    if not isinstance(header, Header):
        return header
    if same_proportion(header.size, size):
        return None
    return f"it is {header.size[0]}x{header.size[1]} and its image {size[0]}x{size[1]}"


def _unfit_masks(subset: SubsetSpec, unfit: Mapping[str, str]) -> Mistake:
    listed = "\n".join(f"  {name}: {why}" for name, why in list(unfit.items())[:_NAMED])
    more = f"\n  and {len(unfit) - _NAMED} more" if len(unfit) > _NAMED else ""
    what = f"{len(unfit)} masks of {subset.mask_dir} cannot be used:\n{listed}{more}"
    return Mistake(what, "a mask needs its image's size, or one in the same proportion, upright; or take it away")


def _without_file(subset: SubsetSpec, name: str) -> str:
    if subset.caption_source == "file_name":
        return " ".join(stem(name).replace("_", " ").split())
    return subset.class_tokens or ""


def _tell_small(small: int, subset: SubsetSpec, *, all_of_them: bool, found: _Findings) -> None:
    found.left_out_small += small
    edge = f"a side below {subset.least_edge} pixels" if subset.least_edge else ""
    area = f"fewer than {subset.least_area} pixels" if subset.least_area else ""
    why = " or ".join(filter(None, (edge, area)))
    if all_of_them:
        what = f"{title(subset)}: all {small} images have {why} ({subset.origin})"
        found.mistakes.append(Mistake(what, "lower the least size, or give larger images"))
    else:
        found.notes.append(f"{title(subset)}: {small} images are left out, as they have {why}")


def _judge_bad_images(found: _Findings, records: Sequence[ImageRecord]) -> None:
    if not found.bad:
        return
    bad = list(found.bad.items())
    total = len(bad) + len({(record.folder, record.name) for record in records})
    listed = "\n".join(f"  {path}: {why}" for path, why in bad[:_NAMED])
    more = f"\n  and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    if len(bad) > _BAD_SHARE * total:
        what = f"{len(bad)} of {total} images are damaged, more than {_BAD_SHARE:.0%}:\n{listed}{more}"
        found.mistakes.append(Mistake(what, "repair or remove them"))


def _balance(
    datasets: Sequence[DatasetSpec], train: list[ImageRecord], reg: list[ImageRecord], found: _Findings
) -> list[ImageRecord]:
    """Dataset by dataset, so that each has as many regularisation samples as training samples."""
    balanced: list[ImageRecord] = []
    for place, dataset in enumerate(datasets):
        records = [record for record in reg if record.dataset == place]
        target = sum(record.repeats for record in train if record.dataset == place)
        if not records:
            continue
        if not target:
            balanced += records
            if train:
                found.notes.append(f"{dataset.origin}: only regularisation images, used with their own repeats")
            continue
        repeats = balance([record.repeats for record in records], [record.subset for record in records], target)
        kept = [replace(record, repeats=repeats[index]) for index, record in enumerate(records) if index in repeats]
        name = f" of {dataset.origin}" if len(datasets) > 1 else ""
        found.notes.append(_balance_note(name, records, kept, target))
        balanced += kept
    return balanced


def _balance_note(name: str, reg: list[ImageRecord], kept: list[ImageRecord], target: int) -> str:
    before, after = sum(record.repeats for record in reg), sum(record.repeats for record in kept)
    text = f"regularisation{name}: {before} samples for {target} training samples"
    if len(kept) < len(reg):
        text += f"; {len(reg) - len(kept)} of {len(reg)} images are left out"
    elif after > before:
        text += f"; repeated to {after}"
    return f"{text}; ratio {after / target:.2f} : 1"


def _note_contents(notes: list[str], records: list[ImageRecord], subsets: Sequence[SubsetSpec]) -> None:
    empty = list(dict.fromkeys(record.path for record in records if not record.caption and record.from_file))
    if empty:
        names = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
        notes.append(f"{len(empty)} images have an empty caption file and are trained on the empty caption: {names}")
    nameless = len({record.path for record in records if not record.caption and not record.from_file})
    if nameless:
        notes.append(f"{nameless} images have neither a caption nor class tokens: empty caption")
    laid_on: dict[tuple[int, int, int], set[Path]] = {}
    masked: set[Path] = set()
    for record in records:
        if record.transparent:
            subset = subsets[record.subset]
            by_alpha = subset.alpha_mask and record.mask is None
            (masked if by_alpha else laid_on.setdefault(subset.images.background, set())).add(record.path)
    for colour, paths in laid_on.items():
        name = "white" if colour == _WHITE else f"the colour {colour}"
        notes.append(f"{len(paths)} images have transparency: they are laid on {name}")
    if masked:
        notes.append(f"{len(masked)} images have transparency, which is their mask")
