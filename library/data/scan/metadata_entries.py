"""Write metadata files of kohya's fine-tuning: the caption or tags of each image of a folder, in one JSON file.

The file is one object, key -> {"caption", "tags", "train_resolution"}, as `metadata_files` and sd-scripts read it. A
key is the image's name without its extension, or its absolute path.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from library.checkpoints.header import CheckpointError
from library.checkpoints.writer import write_text
from library.data.image_files import readable_extensions
from library.data.scan.caption_files import CaptionFiles, normal_extensions, read_caption
from library.data.scan.listing import Directories, Directory, absolute, stem
from library.data.scan.metadata_files import Locator, entries_of
from library.data.scan.pairing import is_mask_label
from library.data.scan.unused_files import CAPTION_EXTENSIONS
from library.limits import METADATA_FILE
from library.messages import counted, listed
from library.options.mistakes import Mistake, UserError
from library.options.text_files import read_text

Entries = dict[str, dict[str, Any]]
"""Key of an image -> what the file says of it."""

_MOST_LISTED = 10  # images named in a mistake


def read_entries(path: Path) -> Entries:
    """Read a .json file with all that its entries hold. Raises UserError."""
    text = read_text(path, f"metadata file {path}", METADATA_FILE)
    if isinstance(text, Mistake):
        raise UserError([text])
    entries: Entries = {}
    mistakes = []
    for _, key, entry in entries_of(path, text):
        if isinstance(entry, dict):
            entries[key] = entry
        else:
            what = f"metadata file {path}: {key!r} is not an object"
            mistakes.append(Mistake(what, 'write {"caption": "...", "tags": "..."}'))
    if mistakes:
        raise UserError(mistakes)
    return entries


def write_entries(path: Path, entries: Entries) -> None:
    """Write a .json file atomically, with the indents and escapes of sd-scripts. Raises UserError."""
    try:
        write_text(path, json.dumps(entries, indent=2))
    except CheckpointError as error:
        raise UserError([Mistake(str(error))]) from error


def read_texts(folder: Path, extensions: str, *, recursive: bool, encoding: str) -> dict[str, str]:
    """Absolute path of each image in a folder, sorted, -> the text of the file beside it.

    `extensions`: of these files, separated by commas. All lines with text are kept. Raises UserError with every image
    that has no such file, and every file that cannot be read.
    """
    texts: dict[str, str] = {}
    missing: list[str] = []
    mistakes: list[Mistake] = []
    endings = [ending.lower() for ending in normal_extensions(extensions)]
    places = _list(folder, endings, recursive=recursive)
    for directory in places:
        names = _images(directory)
        found = CaptionFiles(directory.texts, extensions).pair(names)
        for name in names:
            path = os.path.join(directory.path, name)
            if name not in found:
                missing.append(os.path.relpath(path, absolute(folder)))
                continue
            try:
                texts[path], _ = read_caption(Path(directory.path, found[name]), encoding, all_lines=True)
            except UserError as error:
                mistakes += error.mistakes
        for name, why in (directory.unusable_images | directory.unusable_texts).items():
            mistakes.append(Mistake(f"{os.path.join(directory.path, name)}: {why}", "correct or remove it"))
    if not any(map(_images, places)):
        mistakes.append(Mistake(f"folder {folder} contains no image", "check the path"))
    if missing:
        mistakes.append(_missing(folder, missing, endings, places))
    if mistakes:
        raise UserError(mistakes)
    return texts


def _list(folder: Path, endings: Iterable[str], *, recursive: bool) -> list[Directory]:
    directories = Directories(readable_extensions(), tuple(endings))
    try:
        return [directory for _, directory in directories.below(absolute(folder), recursive=recursive)]
    except OSError as error:
        what = f"folder {folder} cannot be read: {error.strerror or error}"
        raise UserError([Mistake(what, "check the path and its permissions")]) from error


def _images(directory: Directory) -> list[str]:
    """The images of a folder, sorted, without masks beside them."""
    return sorted(name for name in directory.images if not is_mask_label(name))


def _missing(folder: Path, missing: list[str], endings: list[str], places: list[Directory]) -> Mistake:
    images = sum(len(_images(place)) for place in places)
    what = (
        f"folder {folder}: {len(missing)} of {counted(images, 'image')} without a {' or '.join(endings)} file: "
        f"{listed(missing, _MOST_LISTED)}"
    )
    for ending in CAPTION_EXTENSIONS:
        others = (len(CaptionFiles(place.names(), ending).pair(_images(place))) for place in places)
        if ending not in endings and (count := sum(others)) > images - len(missing):
            have = "has" if count == 1 else "have"
            return Mistake(f"{what}; {count} {have} a {ending} file", f"set --caption_extension {ending}")
    return Mistake(what, "write these files, or move the images elsewhere")


def name_images(
    entries: Mapping[str, object], images: Iterable[str], folder: Path, *, full_path: bool
) -> dict[str, str]:
    """The key of each image, given by its absolute path: the one that it has in `entries` under any spelling, else its
    absolute path or, without `full_path`, its stem; its file name if another image has the same stem."""
    paths = list(images)
    locator = Locator.of(Directories(readable_extensions()), folder, readable_extensions())
    known: dict[str, str] = {}
    for key in entries:
        located = locator.find(key)
        if not isinstance(located, str):
            known[os.path.join(located.directory.path, located.base)] = key
    stems = Counter(stem(os.path.basename(path)) for path in paths)

    def new_key(path: str) -> str:
        name = os.path.basename(path)
        return path if full_path else stem(name) if stems[stem(name)] == 1 else name

    return {path: known.get(path) or new_key(path) for path in paths}
