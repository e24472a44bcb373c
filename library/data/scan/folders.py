"""Folders as datasets: named `<repeats>_<identifier> <class>` as in kohya's sd-scripts, or plain.

Unlike sd-scripts, folders are sorted, each skipped folder is reported, and finding no folder is a mistake. The images
in the folders are listed by the scan.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from library.data.image_files import readable_extensions
from library.data.scan.listing import is_image
from library.messages import counted
from library.options.datasets import DatasetSpec, ParsedDatasets, SubsetSpec
from library.options.mistakes import Mistake

_FOLDER = re.compile(r"([0-9]+)(?:_(.*))?", re.ASCII | re.DOTALL)
_MOST_REPEATS = 100_000  # a larger number is a date or a telephone number
_EXAMPLE = '"10_sks dog" (repeats, underscore, identifier and class)'
_REG_EXAMPLE = '"1_dog" (repeats, underscore, class)'


def folder_datasets(train_data_dir: Path | None, reg_data_dir: Path | None, template: DatasetSpec) -> ParsedDatasets:
    """One dataset of the folders with repeats in both places. Other settings come from `template` and its first
    subset."""
    subsets: list[SubsetSpec] = []
    notes: list[str] = []
    mistakes: list[Mistake] = []
    template_subset = template.subsets[0]
    if train_data_dir is None:
        remedy = f"set it to the folder that contains folders like {_EXAMPLE}"
        mistakes.append(Mistake("--train_data_dir is not set", remedy))
    else:
        _read_folders(train_data_dir, replace(template_subset, origin="--train_data_dir"), subsets, notes, mistakes)
    _read_regularisation(reg_data_dir, train_data_dir, template_subset, subsets, notes, mistakes)
    return _to_described(template, subsets, notes, mistakes)


def plain_folder(
    folder: Path, template: DatasetSpec, class_tokens: str | None, repeats: int, reg_data_dir: Path | None = None
) -> ParsedDatasets:
    """One dataset of the images directly in `folder`; regularisation images are in folders with repeats."""
    subsets: list[SubsetSpec] = []
    notes: list[str] = []
    mistakes: list[Mistake] = []
    template_subset = template.subsets[0]
    if not folder.is_dir():
        mistakes.append(no_folder("--train_data_dir", folder))
    elif (named := _folder_with_repeats(folder)) and not _count_images(folder):
        what = f'--class_tokens "{class_tokens}": {folder} contains folders with repeats, like {named}, but no images'
        mistakes.append(
            Mistake(what, "remove --class_tokens and --num_repeats, or set the folder that contains the images")
        )
    else:
        plain = replace(
            template_subset, image_dir=folder, origin="--train_data_dir", repeats=repeats, class_tokens=class_tokens
        )
        subsets.append(plain)
    _read_regularisation(reg_data_dir, folder, template_subset, subsets, notes, mistakes)
    return _to_described(template, subsets, notes, mistakes)


def metadata_file(
    file: Path, folder: Path | None, template: DatasetSpec, repeats: int, reg_data_dir: Path | None = None
) -> ParsedDatasets:
    """One dataset of the images listed in a metadata file; regularisation images are in folders with repeats.
    Relative paths in the file are relative to `folder`."""
    notes: list[str] = []
    mistakes: list[Mistake] = []
    template_subset = template.subsets[0]
    listed = replace(
        template_subset,
        image_dir=folder,
        metadata_file=file,
        origin="--in_json",
        repeats=repeats,
        caption_source="metadata",
    )
    subsets = [listed]
    _read_regularisation(reg_data_dir, folder, template_subset, subsets, notes, mistakes)
    return _to_described(template, subsets, notes, mistakes)


def _to_described(
    template: DatasetSpec, subsets: list[SubsetSpec], notes: list[str], mistakes: list[Mistake]
) -> ParsedDatasets:
    datasets = (replace(template, subsets=tuple(subsets)),) if subsets else ()
    return ParsedDatasets(datasets, tuple(notes), tuple(mistakes))


def _read_regularisation(
    base: Path | None,
    train_data_dir: Path | None,
    template_subset: SubsetSpec,
    subsets: list[SubsetSpec],
    notes: list[str],
    mistakes: list[Mistake],
) -> None:
    if base is None:
        return
    if train_data_dir is not None and base.resolve() == train_data_dir.resolve():
        what = f"--reg_data_dir and --train_data_dir are the same folder: {base}"
        mistakes.append(Mistake(what, "use two folders, or remove --reg_data_dir"))
        return
    _read_folders(base, replace(template_subset, origin="--reg_data_dir", is_reg=True), subsets, notes, mistakes)


def _read_folders(
    base: Path, template_subset: SubsetSpec, subsets: list[SubsetSpec], notes: list[str], mistakes: list[Mistake]
) -> None:
    flag = template_subset.origin
    try:
        folders = sorted((entry for entry in base.iterdir() if entry.is_dir()), key=lambda path: path.name)
    except OSError:
        mistakes.append(no_folder(flag, base))
        return
    found: list[SubsetSpec] = []
    dates: list[Mistake] = []
    for folder in folders:
        match = _FOLDER.fullmatch(folder.name)
        if match is None:
            notes.append(f"skipped folder {folder}: its name does not begin with repeats and an underscore")
        elif int(match.group(1)) < 1:
            notes.append(f"skipped folder {folder}: its repeats are 0")
        elif int(match.group(1)) > _MOST_REPEATS:
            what = f"{flag}: folder {folder} would be repeated {match.group(1)} times"
            dates.append(Mistake(what, "if its name begins with a date, put the repeats in front of it: 10_..."))
        else:
            tokens = match.group(2) or ""
            found.append(replace(template_subset, image_dir=folder, repeats=int(match.group(1)), class_tokens=tokens))
    loose = _count_images(base)
    if not found and not dates:
        mistakes.append(_nothing_found(base, flag, loose))
    elif loose:
        notes.append(f"{counted(loose, 'image')} directly in {base} not used; move them into a folder like {_EXAMPLE}")
    subsets += found
    mistakes += dates


def no_folder(flag: str, folder: Path) -> Mistake:
    """The mistake about a folder that cannot be listed. `flag`: who names it, such as --train_data_dir."""
    if folder.is_dir():
        return Mistake(f"{flag}: {folder} cannot be read", "check its permissions")
    if folder.is_file():
        return Mistake(f"{flag}: {folder} is a file, not a folder", "name the folder")
    return Mistake(f"{flag}: there is no folder {folder}", "check the path")


def _nothing_found(base: Path, flag: str, loose: int) -> Mistake:
    what = f"{flag}: {base} contains no folder like {_REG_EXAMPLE if flag == '--reg_data_dir' else _EXAMPLE}"
    if not loose:
        return Mistake(what, f"put the images into such a folder in {base}")
    what += f", but {counted(loose, 'image')}"
    if _FOLDER.fullmatch(base.name):
        return Mistake(what, f"use the folder above it: {flag}={base.parent}")
    remedy = f"move the images into such a folder in {base}"
    if flag == "--train_data_dir":
        remedy += ', or set --class_tokens "sks dog" --num_repeats 10'
    return Mistake(what, remedy)


def _folder_with_repeats(folder: Path) -> str | None:
    """The name of a sub-folder with repeats, if there is one."""
    return min(
        (entry.name for entry in folder.iterdir() if _FOLDER.fullmatch(entry.name) and entry.is_dir()), default=None
    )


def _count_images(folder: Path) -> int:
    extensions = readable_extensions()
    return sum(is_image(entry.name, extensions) and not entry.is_dir() for entry in folder.iterdir())
