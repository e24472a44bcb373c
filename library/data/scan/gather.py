"""Find the images of a subset with their caption files and masks, by name alone: no image is opened."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from library.data.scan.caption_files import CaptionFiles, normal_extension
from library.data.scan.file_contents import Reading
from library.data.scan.listing import Directories, Directory, absolute
from library.data.scan.mask_files import find_masks
from library.data.scan.metadata_files import Locator, read_metadata
from library.data.scan.pairing import is_mask_label
from library.data.scan.unused_files import (
    CAPTION_EXTENSIONS,
    Places,
    note_captions,
    note_folders,
    note_formats,
    note_mask_labels,
)
from library.messages import counted, listed
from library.options.datasets import SubsetSpec
from library.options.mistakes import Mistake, UserError


class ImageFile(NamedTuple):
    """An image file of a subset, before it is opened."""

    folder: Path  # one object for all images of a folder
    name: str  # path relative to `folder`, with "/"
    directory: Directory  # the folder it is in
    base: str  # its file name
    caption_file: str | None = None  # file name in the same folder
    text: str | None = None  # caption from a metadata file
    score: float | None = None  # aesthetic score from a metadata file


class OtherCaptions(NamedTuple):
    """More images of a subset have a caption file with a usual ending than with its own."""

    ending: str
    files: int
    mistake: Mistake


@dataclass(slots=True)
class Gathered:
    """The files of one subset."""

    images: list[ImageFile] = field(default_factory=list)
    reading: Reading = field(default_factory=Reading)
    masks: dict[str, str] = field(default_factory=dict)  # image -> mask, relative paths
    mask_places: dict[str, tuple[Directory, str]] = field(default_factory=dict)  # mask -> its folder and file name
    unused_masks: tuple[str, ...] | None = None  # masks that belong to no image; None: not searched
    unusable: list[tuple[Path, str]] = field(default_factory=list)  # unreadable images, and why
    notes: list[str] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    other_captions: OtherCaptions | None = None


def caption_endings(subsets: Sequence[SubsetSpec]) -> set[str]:
    """Lower-case extensions of all caption files that the subsets may have."""
    return {normal_extension(ending).lower() for subset in subsets for ending in subset.caption_extensions}


def gather(subset: SubsetSpec, directories: Directories, extensions: Collection[str]) -> Gathered:
    """List the images of a subset, sorted by name, from its folder or its metadata file."""
    result = Gathered(reading=Reading(subset.caption_encoding, subset.captions.wildcard))
    if subset.metadata_file is not None:
        _list_from_metadata(subset, subset.metadata_file, directories, extensions, result)
    else:
        _list_from_folder(subset, directories, extensions, result)
    if not result.images and not result.mistakes and not result.unusable:
        result.mistakes.append(_no_images(subset))
    if subset.mask_folder is not None and result.images:
        _match_masks(subset.mask_folder, subset, directories, extensions, result)
    return result


def setting(subset: SubsetSpec, name: str, value: str) -> str:
    """How to write a setting in the place where this subset is configured."""
    return f"--{name}={value}" if subset.origin.startswith("--") else f'{name} = "{value}" ({subset.origin})'


def _no_images(subset: SubsetSpec) -> Mistake:
    if subset.metadata_file is not None:
        return Mistake(f"metadata file {subset.metadata_file} lists no image ({subset.origin})", "add images to it")
    kind = "regularisation folder" if subset.is_reg else "folder"
    place = "" if subset.origin.startswith("--") else f" ({subset.origin})"
    return Mistake(f"{kind} {subset.image_dir} contains no image{place}", "add images, or remove the folder")


def _own_folder(image_dir: Path) -> Path:
    """The folder with a proper name, because random draws are keyed by it."""
    return image_dir if image_dir.name not in ("", "..") else Path(absolute(image_dir))


def _list_folders(
    folder: Path, what: str, subset: SubsetSpec, directories: Directories, result: Gathered
) -> list[tuple[str, Directory]]:
    try:
        return directories.below(absolute(folder), recursive=subset.recursive)
    except FileNotFoundError:
        result.mistakes.append(Mistake(f"there is no {what} {folder} ({subset.origin})", "check the path"))
    except NotADirectoryError:
        result.mistakes.append(
            Mistake(f"{what} {folder} is a file ({subset.origin})", "use the folder that contains it")
        )
    except (OSError, ValueError) as error:
        result.mistakes.append(
            Mistake(f"{what} {folder} cannot be read: {error} ({subset.origin})", "check the path and its permissions")
        )
    return []


def _list_from_folder(
    subset: SubsetSpec, directories: Directories, extensions: Collection[str], result: Gathered
) -> None:
    if subset.image_folder is None:
        result.mistakes.append(Mistake(f"{subset.origin} has no folder", "set image_dir"))
        return
    folder = _own_folder(subset.image_folder)
    below = _list_folders(subset.image_folder, "folder", subset, directories, result)
    from_files = subset.caption_source == "files"
    labels: list[str] = []
    for prefix, directory in below:
        names = [name for name in directory.images if not is_mask_label(name)]
        labels += [prefix + name for name in directory.images if is_mask_label(name)]
        captions = CaptionFiles(directory.texts, subset.caption_extensions).pair(names) if from_files else {}
        result.images += [ImageFile(folder, prefix + name, directory, name, captions.get(name)) for name in names]
        result.unusable += [(folder / (prefix + name), why) for name, why in directory.unusable_images.items()]
        if from_files:
            result.mistakes += [
                Mistake(f"caption file {folder / (prefix + name)}: {why}", "correct or remove it")
                for name, why in directory.unusable_texts.items()
            ]
    result.images.sort(key=lambda image: image.name)
    result.notes += note_folders(subset, below, extensions)
    if not _has_masks_beside(subset):
        result.notes += note_mask_labels(sorted(labels), subset.image_folder, _mask_flags(subset))
    if from_files:
        result.other_captions = _find_other_captions(subset, result.images)
    if result.other_captions is None:
        _note_unused(subset, below, extensions, result)


def _note_unused(subset: SubsetSpec, places: Places, extensions: Collection[str], result: Gathered) -> None:
    """Note other formats, and caption files that are not used."""
    images: dict[str, list[str]] = {}
    used: dict[str, set[str]] = {}
    for _, directory in places:
        images[directory.path] = list(directory.unusable_images)
    for image in result.images:
        images[image.directory.path].append(image.base)
        if image.caption_file is not None:
            used.setdefault(image.directory.path, set()).add(image.caption_file)
    place = subset.image_dir or subset.metadata_file
    result.notes += note_formats(place, places, extensions)
    result.notes += note_captions(place, subset, places, images, used)


def _has_masks_beside(subset: SubsetSpec) -> bool:
    """Whether the mask folder is the image folder, which has masks named like img0-masklabel.png."""
    if subset.mask_folder is None or subset.image_folder is None:
        return False
    return absolute(subset.mask_folder) == absolute(subset.image_folder)


def _mask_flags(subset: SubsetSpec) -> str:
    """How to use the masks beside the images of a subset."""
    if subset.origin.startswith("--"):
        return f"--masked_loss --conditioning_data_dir={subset.image_dir}"
    return f"--masked_loss, and the folder {subset.image_dir} as that of the masks ({subset.origin})"


def _find_other_captions(subset: SubsetSpec, images: Sequence[ImageFile]) -> OtherCaptions | None:
    """The captions of most images if they have another extension: only the class tokens would be trained."""
    with_caption = sum(image.caption_file is not None for image in images)
    if 2 * with_caption >= len(images):
        return None
    expected = [normal_extension(ending) for ending in subset.caption_extensions]
    folders: dict[str, tuple[Directory, list[str]]] = {}
    for image in images:
        folders.setdefault(image.directory.path, (image.directory, []))[1].append(image.base)
    for ending in CAPTION_EXTENSIONS:
        if ending in (known.lower() for known in expected):
            continue
        other = sum(len(CaptionFiles(place.names(), ending).pair(names)) for place, names in folders.values())
        if other > with_caption:
            mistake = Mistake(
                f"{subset.image_dir}: {with_caption} of {counted(len(images), 'image')} {_have(len(images))} a "
                f"{' or '.join(expected)} file, {other} {_have(other)} a {ending} file",
                f"set {setting(subset, 'caption_extension', ending)}; or, to train on "
                f"{'the folder name' if subset.origin.startswith('--') else 'class_tokens'} instead, "
                f"move the {ending} files elsewhere",
            )
            return OtherCaptions(ending, other, mistake)
    return None


def check_caption_endings(subsets: Sequence[SubsetSpec], gathered: Sequence[Gathered]) -> None:
    """Report captions with another extension: a mistake, or a note if the extension switches caption files off.

    It does so if it is not a usual one and no image of the run has such a file. kohya_ss has no other way to do it, and
    saved presets hold ".none-use-foldername" or ".txt2".
    """
    in_use: set[tuple[str, ...]] = set()
    for subset, result in zip(subsets, gathered, strict=True):
        if any(image.caption_file is not None for image in result.images):
            in_use.add(subset.caption_extensions)
    for subset, result in zip(subsets, gathered, strict=True):
        other = result.other_captions
        if other is None:
            continue
        expected = {normal_extension(ending).lower() for ending in subset.caption_extensions}
        if subset.caption_extensions in in_use or not expected.isdisjoint(CAPTION_EXTENSIONS):
            result.mistakes.append(other.mistake)
            continue
        tokens = f'"{subset.class_tokens}"' if subset.class_tokens else "the empty text"
        result.notes.append(
            f"{subset.image_dir}: no image has a {' or '.join(sorted(expected))} file: no caption file is read, and "
            f"{tokens} is the caption of all ({counted(other.files, f'{other.ending} file')} not used; to use them "
            f"set {setting(subset, 'caption_extension', other.ending)})"
        )


def _have(count: int) -> str:
    return "has" if count == 1 else "have"


def _list_from_metadata(
    subset: SubsetSpec, file: Path, directories: Directories, extensions: Collection[str], result: Gathered
) -> None:
    try:
        metadata = read_metadata(file, subset.captions)
    except UserError as error:
        result.mistakes.extend(error.mistakes)
        return
    image_dir = subset.image_folder
    if image_dir is not None and not _list_folders(image_dir, "folder", subset, directories, result):
        return
    locator = Locator.of(directories, image_dir, extensions)
    root = None if image_dir is None else absolute(image_dir)
    own = None if image_dir is None else _own_folder(image_dir)
    folders: dict[str, tuple[Path, str]] = {}  # directory -> ImageFile.folder and the prefix of names in it
    seen: set[tuple[str, str]] = set()
    labels: list[str] = []
    twice = metadata.twice
    for key, caption in metadata.captions.items():
        located = locator.find(key)
        if isinstance(located, str):
            result.unusable.append((Path(key) if own is None else own / key, f"listed in {file.name}, but {located}"))
            continue
        directory, base = located.directory, located.base
        if (directory.path, base) in seen:
            twice += 1
            continue
        seen.add((directory.path, base))
        if is_mask_label(base):
            labels.append(key)
            continue
        if directory.path not in folders:
            folders[directory.path] = _relative(directory.path, root, own)
        folder, prefix = folders[directory.path]
        score = metadata.scores.get(key)
        result.images.append(ImageFile(folder, prefix + base, directory, base, None, caption, score))
    result.images.sort(key=lambda image: (str(image.folder), image.name))
    result.notes += note_mask_labels(labels, file, _mask_flags(subset))
    if twice:
        result.notes.append(f"{file}: {counted(twice, 'image')} listed twice, used once")
    if root is not None and not result.unusable:
        _note_unlisted(file, directories.get(root), seen, result)
    places = {directory: prefix for directory, (_, prefix) in folders.items()}
    if root is not None and not places:
        places[root] = ""
    _note_unused(subset, [(prefix, directories.get(path)) for path, prefix in places.items()], extensions, result)


def _relative(path: str, root: str | None, own: Path | None) -> tuple[Path, str]:
    if root is not None and own is not None:
        if path == root:
            return own, ""
        if path.startswith(os.path.join(root, "")):
            return own, path[len(os.path.join(root, "")) :].replace(os.sep, "/") + "/"
    return Path(path), ""


def _note_unlisted(file: Path, directory: Directory, seen: set[tuple[str, str]], result: Gathered) -> None:
    names = (name for name in directory.images if not is_mask_label(name))
    unlisted = sum((directory.path, name) not in seen for name in names)
    if unlisted:
        result.notes.append(f"{directory.path}: {counted(unlisted, 'image')} not listed in {file.name}, not used")


def _match_masks(
    mask_dir: Path, subset: SubsetSpec, directories: Directories, extensions: Collection[str], result: Gathered
) -> None:
    below = _list_folders(mask_dir, "mask folder", subset, directories, result)
    if not below:
        return
    places = {prefix + name: (directory, name) for prefix, directory in below for name in directory.images}
    if _has_masks_beside(subset) and any(map(is_mask_label, places)):  # an image is not its own mask
        places = {name: place for name, place in places.items() if is_mask_label(name)}
    result.masks, result.unused_masks = find_masks((image.name for image in result.images), places)
    result.mask_places = {name: places[name] for name in result.masks.values()}
    missing = sum(image.name not in result.masks for image in result.images)
    if missing:
        what = f"{subset.source}: {missing} of {counted(len(result.images), 'image')} without a mask in {mask_dir}"
        result.notes.append(f"{what}: trained {'with transparency as mask, or ' if subset.alpha_mask else ''}unmasked")


def check_masks(subsets: Sequence[SubsetSpec], gathered: Sequence[Gathered]) -> None:
    """Report mask folders without any mask for a subset, and masks without an image.

    Subsets may share a mask folder: the command line has one for all image folders, some of which may have no masks.
    """
    sharing: dict[str, list[int]] = {}
    for number, (subset, result) in enumerate(zip(subsets, gathered, strict=True)):
        if subset.mask_folder is not None and result.unused_masks is not None:
            sharing.setdefault(absolute(subset.mask_folder), []).append(number)
    for numbers in sharing.values():
        result = gathered[numbers[0]]
        used = any(gathered[number].masks for number in numbers)
        for number in numbers:
            subset = subsets[number]
            by_flag = subset.origin.startswith("--")
            if gathered[number].masks or (by_flag and (used or number != numbers[0])):
                continue
            what = f"{subset.mask_dir} contains no mask for any image of {subset.source} ({subset.origin})"
            result.mistakes.append(Mistake(what, "name each mask like its image, with any extension"))
        unused = sorted(set.intersection(*(set(gathered[number].unused_masks or ()) for number in numbers)))
        if used and unused:
            mask_dir = subsets[numbers[0]].mask_dir
            result.notes.append(f"{mask_dir}: {counted(len(unused), 'mask')} without an image: {listed(unused, 5)}")
