"""Folders as data sets: the convention `<repeats>_<identifier> <class>`, and plain folders without a number.

The convention is that of kohya's sd-scripts. Unlike there, folders are sorted, each skipped one is told, and a place
where nothing is found is a mistake. What lies in the folders is for the scan.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from library.data.scan.image_headers import readable_extensions
from library.data.scan.listing import is_image
from library.options.datasets import DatasetSpec, ParsedDatasets, SubsetSpec
from library.options.mistakes import Mistake

_FOLDER = re.compile(r"([0-9]+)(?:_(.*))?", re.ASCII | re.DOTALL)
_MOST_REPEATS = 100_000  # above it a folder's number is a date or a telephone number
_EXAMPLE = '"10_sks dog" (repeats, underscore, identifier and class)'
_REG_EXAMPLE = '"1_dog" (repeats, underscore, class)'


def folder_datasets(train_data_dir: Path | None, reg_data_dir: Path | None, template: DatasetSpec) -> ParsedDatasets:
    """One dataset of the convention's folders in both places. All that the folders do not say comes from `template`
    and its first subset."""
    subsets: list[SubsetSpec] = []
    notes: list[str] = []
    mistakes: list[Mistake] = []
    model = template.subsets[0]
    if train_data_dir is None:
        remedy = f"give the folder that holds folders like {_EXAMPLE}"
        mistakes.append(Mistake("--train_data_dir is not set", remedy))
    else:
        _read_base(train_data_dir, replace(model, origin="--train_data_dir"), subsets, notes, mistakes)
    _read_reg(reg_data_dir, train_data_dir, model, subsets, notes, mistakes)
    return _described(template, subsets, notes, mistakes)


def plain_folder(
    folder: Path, template: DatasetSpec, class_tokens: str | None, repeats: int, reg_data_dir: Path | None = None
) -> ParsedDatasets:
    """One dataset of the images that lie directly in `folder`, with regularisation images by the convention."""
    subsets: list[SubsetSpec] = []
    notes: list[str] = []
    mistakes: list[Mistake] = []
    model = template.subsets[0]
    if not folder.is_dir():
        mistakes.append(_no_folder("--train_data_dir", folder))
    elif (named := _numbered(folder)) and not _count_images(folder):
        what = f'--class_tokens "{class_tokens}": {folder} holds no images but folders with repeats, like {named}'
        mistakes.append(Mistake(what, "leave out --class_tokens and --num_repeats, or give the folder of the images"))
    else:
        plain = replace(model, image_dir=folder, origin="--train_data_dir", repeats=repeats, class_tokens=class_tokens)
        subsets.append(plain)
    _read_reg(reg_data_dir, folder, model, subsets, notes, mistakes)
    return _described(template, subsets, notes, mistakes)


def metadata_file(
    file: Path, folder: Path | None, template: DatasetSpec, repeats: int, reg_data_dir: Path | None = None
) -> ParsedDatasets:
    """One dataset of the images that a metadata file lists, with regularisation images by the convention. `folder`
    is what relative paths in the file are relative to."""
    notes: list[str] = []
    mistakes: list[Mistake] = []
    model = template.subsets[0]
    listed = replace(
        model, image_dir=folder, metadata_file=file, origin="--in_json", repeats=repeats, caption_source="metadata"
    )
    subsets = [listed]
    _read_reg(reg_data_dir, folder, model, subsets, notes, mistakes)
    return _described(template, subsets, notes, mistakes)


def _described(
    template: DatasetSpec, subsets: list[SubsetSpec], notes: list[str], mistakes: list[Mistake]
) -> ParsedDatasets:
    datasets = (replace(template, subsets=tuple(subsets)),) if subsets else ()
    return ParsedDatasets(datasets, tuple(notes), tuple(mistakes))


def _read_reg(
    base: Path | None,
    train_data_dir: Path | None,
    model: SubsetSpec,
    subsets: list[SubsetSpec],
    notes: list[str],
    mistakes: list[Mistake],
) -> None:
    if base is None:
        return
    if train_data_dir is not None and base.resolve() == train_data_dir.resolve():
        what = f"--reg_data_dir and --train_data_dir are the same folder: {base}"
        mistakes.append(Mistake(what, "give two folders, or leave --reg_data_dir out"))
        return
    _read_base(base, replace(model, origin="--reg_data_dir", is_reg=True), subsets, notes, mistakes)


def _read_base(
    base: Path, model: SubsetSpec, subsets: list[SubsetSpec], notes: list[str], mistakes: list[Mistake]
) -> None:
    flag = model.origin
    try:
        folders = sorted((entry for entry in base.iterdir() if entry.is_dir()), key=lambda path: path.name)
    except OSError:
        mistakes.append(_no_folder(flag, base))
        return
    found: list[SubsetSpec] = []
    dates: list[Mistake] = []
    for folder in folders:
        match = _FOLDER.fullmatch(folder.name)
        if match is None:
            notes.append(f"not read: {folder} (its name does not begin with a number of repeats and an underscore)")
        elif int(match.group(1)) < 1:
            notes.append(f"not read: {folder} (its number of repeats is 0)")
        elif int(match.group(1)) > _MOST_REPEATS:
            what = f"{flag}: folder {folder} would be repeated {match.group(1)} times"
            dates.append(Mistake(what, "if its name begins with a date, put the repeats before it: 10_..."))
        else:
            tokens = match.group(2) or ""
            found.append(replace(model, image_dir=folder, repeats=int(match.group(1)), class_tokens=tokens))
    loose = _count_images(base)
    if not found and not dates:
        mistakes.append(_nothing_found(base, flag, loose))
    elif loose:
        notes.append(f"{loose} images directly in {base} are not used: only those in its folders are")
    subsets += found
    mistakes += dates


def _no_folder(flag: str, folder: Path) -> Mistake:
    if folder.is_dir():
        return Mistake(f"{flag}: {folder} cannot be read", "allow yourself to read it")
    return Mistake(f"{flag}: there is no folder {folder}", "check the path")


def _nothing_found(base: Path, flag: str, loose: int) -> Mistake:
    what = f"{flag}: {base} holds no folder like {_REG_EXAMPLE if flag == '--reg_data_dir' else _EXAMPLE}"
    if not loose:
        return Mistake(what, f"put the images into such a folder inside {base}")
    what += f", but {loose} images"
    if _FOLDER.fullmatch(base.name):
        return Mistake(what, f"give the folder above it: {flag}={base.parent}")
    remedy = f"move the images into such a folder inside {base}"
    if flag == "--train_data_dir":
        remedy += ', or say what they show: --class_tokens "sks dog" --num_repeats 10'
    return Mistake(what, remedy)


def _numbered(folder: Path) -> str | None:
    """The name of a folder of the convention inside, if there is one."""
    return min(
        (entry.name for entry in folder.iterdir() if _FOLDER.fullmatch(entry.name) and entry.is_dir()), default=None
    )


def _count_images(folder: Path) -> int:
    extensions = readable_extensions()
    return sum(is_image(entry.name, extensions) and not entry.is_dir() for entry in folder.iterdir())
