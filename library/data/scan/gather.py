"""Find the images of a subset with their caption files and masks, by name alone: no image is opened."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from library.data.scan.caption_files import CaptionFiles, normal_extension
from library.data.scan.file_contents import Reading
from library.data.scan.image_headers import OPTIONAL_EXTENSIONS
from library.data.scan.listing import Directories, Directory, absolute, is_image, stem
from library.data.scan.mask_files import find_masks
from library.data.scan.metadata_files import Locator, read_metadata
from library.messages import counted, listed
from library.options.datasets import SubsetSpec
from library.options.mistakes import Mistake, UserError

CAPTION_EXTENSIONS = (".txt", ".caption")  # the usual extensions


class ImageFile(NamedTuple):
    """An image file of a subset, before it is opened."""

    folder: Path  # one object for all images of a folder
    name: str  # path relative to `folder`, with "/"
    directory: Directory  # the folder it is in
    base: str  # its file name
    caption_file: str | None = None  # file name in the same folder
    text: str | None = None  # caption from a metadata file
    score: float | None = None  # aesthetic score from a metadata file


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


def title(subset: SubsetSpec) -> str:
    """Name of a subset in messages."""
    return str(subset.metadata_file if subset.image_dir is None else subset.image_dir)


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
    for prefix, directory in below:
        captions = CaptionFiles(directory.texts, subset.caption_extensions) if from_files and directory.texts else None
        for name in directory.images:
            caption_file = captions.find(stem(name)) if captions else None
            result.images.append(ImageFile(folder, prefix + name, directory, name, caption_file))
        result.unusable += [(folder / (prefix + name), why) for name, why in directory.unusable_images.items()]
        if from_files:
            result.mistakes += [
                Mistake(f"caption file {folder / (prefix + name)}: {why}", "correct or remove it")
                for name, why in directory.unusable_texts.items()
            ]
    result.images.sort(key=lambda image: image.name)
    _note_unused(subset, [directory for _, directory in below], extensions, result)
    if from_files and (mistake := _check_caption_extension(subset, result.images)) is not None:
        result.mistakes.append(mistake)


def _note_unused(
    subset: SubsetSpec, directories: Sequence[Directory], extensions: Collection[str], result: Gathered
) -> None:
    folders = [name for directory in directories for name in directory.folders]
    if folders and not subset.recursive:
        result.notes.append(f"{subset.image_dir}: {counted(len(folders), 'sub-folder')} not read")
    result.notes += [
        f"{subset.image_dir}: {name} is a folder, not an image" for name in folders if is_image(name, extensions)
    ]
    for ending, package in OPTIONAL_EXTENSIONS.items():
        if ending in extensions:
            continue
        if count := sum(name.lower().endswith(ending) for directory in directories for name in directory.others):
            what = f"{subset.image_dir}: {counted(count, f'{ending} image')} not used; install {package} to read them"
            result.notes.append(what)


def _check_caption_extension(subset: SubsetSpec, images: Sequence[ImageFile]) -> Mistake | None:
    """A mistake if most captions have another extension: only the class tokens would be trained."""
    with_caption = sum(image.caption_file is not None for image in images)
    if 2 * with_caption >= len(images):
        return None
    expected = [normal_extension(ending) for ending in subset.caption_extensions]
    for ending in CAPTION_EXTENSIONS:
        if ending in (known.lower() for known in expected):
            continue
        files: dict[str, CaptionFiles] = {}
        other = 0
        for image in images:
            directory = image.directory
            if directory.path not in files:
                files[directory.path] = CaptionFiles(directory.names(), ending)
            other += files[directory.path].find(stem(image.base)) is not None
        if other > with_caption:
            return Mistake(
                f"{subset.image_dir}: {with_caption} of {len(images)} images have a {' or '.join(expected)} file, "
                f"{other} have a {ending} file",
                f"set {setting(subset, 'caption_extension', ending)}; or, to train on "
                f"{'the folder name' if subset.origin.startswith('--') else 'class_tokens'} instead, "
                f"move the {ending} files elsewhere",
            )
    return None


def _list_from_metadata(
    subset: SubsetSpec, file: Path, directories: Directories, extensions: Collection[str], result: Gathered
) -> None:
    try:
        metadata = read_metadata(file, subset.captions)
    except UserError as error:
        result.mistakes.extend(error.mistakes)
        return
    image_dir = subset.image_folder
    if image_dir is not None and not image_dir.is_dir():
        result.mistakes.append(Mistake(f"there is no folder {image_dir} ({subset.origin})", "check the path"))
        return
    locator = Locator.of(directories, image_dir, extensions)
    root = None if image_dir is None else absolute(image_dir)
    own = None if image_dir is None else _own_folder(image_dir)
    folders: dict[str, tuple[Path, str]] = {}  # directory -> ImageFile.folder and the prefix of names in it
    seen: set[tuple[str, str]] = set()
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
        if directory.path not in folders:
            folders[directory.path] = _relative(directory.path, root, own)
        folder, prefix = folders[directory.path]
        score = metadata.scores.get(key)
        result.images.append(ImageFile(folder, prefix + base, directory, base, None, caption, score))
    result.images.sort(key=lambda image: (str(image.folder), image.name))
    if twice:
        result.notes.append(f"{file}: {counted(twice, 'image')} listed twice, used once")
    if root is not None and not result.unusable:
        _note_unlisted(file, directories.get(root), seen, extensions, result)


def _relative(path: str, root: str | None, own: Path | None) -> tuple[Path, str]:
    if root is not None and own is not None:
        if path == root:
            return own, ""
        if path.startswith(os.path.join(root, "")):
            return own, path[len(os.path.join(root, "")) :].replace(os.sep, "/") + "/"
    return Path(path), ""


def _note_unlisted(
    file: Path, directory: Directory, seen: set[tuple[str, str]], extensions: Collection[str], result: Gathered
) -> None:
    unlisted = sum((directory.path, name) not in seen for name in directory.images)
    if unlisted:
        result.notes.append(f"{directory.path}: {counted(unlisted, 'image')} not listed in {file.name}, not used")


def _match_masks(
    mask_dir: Path, subset: SubsetSpec, directories: Directories, extensions: Collection[str], result: Gathered
) -> None:
    below = _list_folders(mask_dir, "mask folder", subset, directories, result)
    if not below:
        return
    places = {prefix + name: (directory, name) for prefix, directory in below for name in directory.images}
    result.masks, result.unused_masks = find_masks((image.name for image in result.images), places)
    result.mask_places = {name: places[name] for name in result.masks.values()}
    missing = sum(image.name not in result.masks for image in result.images)
    if missing:
        what = f"{title(subset)}: {missing} of {counted(len(result.images), 'image')} without a mask in {mask_dir}"
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
            what = f"{subset.mask_dir} contains no mask for any image of {title(subset)} ({subset.origin})"
            result.mistakes.append(Mistake(what, "name each mask like its image, with any extension"))
        unused = sorted(set.intersection(*(set(gathered[number].unused_masks or ()) for number in numbers)))
        if used and unused:
            mask_dir = subsets[numbers[0]].mask_dir
            result.notes.append(f"{mask_dir}: {counted(len(unused), 'mask')} without an image: {listed(unused, 5)}")
