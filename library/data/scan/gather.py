"""Which images a subset has, and where the caption and the mask of each lie: names only, nothing is opened."""

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
from library.options.datasets import SubsetSpec
from library.options.mistakes import Mistake, UserError

CAPTION_EXTENSIONS = (".txt", ".caption")  # usual ones


class ImageFile(NamedTuple):
    """A file that is to be an image of a subset."""

    folder: Path  # one object for all images of a folder
    name: str  # its path in `folder`, "/" between the parts
    directory: Directory  # where it lies
    base: str  # its name there
    caption_file: str | None = None  # the name of its caption file there
    text: str | None = None  # its caption, if a metadata file says it
    score: float | None = None  # its aesthetic score, if a metadata file says it


@dataclass(slots=True)
class Gathered:
    """What was found of one subset."""

    images: list[ImageFile] = field(default_factory=list)
    reading: Reading = field(default_factory=Reading)
    masks: dict[str, str] = field(default_factory=dict)  # image -> mask, names in their folders
    mask_places: dict[str, tuple[Directory, str]] = field(default_factory=dict)  # where each lies, its name there
    spare_masks: tuple[str, ...] | None = None  # that belong to none of its images; None: not looked for
    lost: list[tuple[Path, str]] = field(default_factory=list)  # what is no readable image, and why
    notes: list[str] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)


def caption_endings(subsets: Sequence[SubsetSpec]) -> set[str]:
    """Lower-case endings of all caption files that the subsets may need."""
    return {normal_extension(ending).lower() for subset in subsets for ending in subset.caption_extensions}


def gather(subset: SubsetSpec, directories: Directories, extensions: Collection[str]) -> Gathered:
    """The images of a subset, sorted by name; from its metadata file as listed there."""
    found = Gathered(reading=Reading(subset.caption_encoding, subset.captions.wildcard))
    if subset.metadata_file is not None:
        _from_metadata(subset, subset.metadata_file, directories, extensions, found)
    else:
        _from_folder(subset, directories, extensions, found)
    if not found.images and not found.mistakes and not found.lost:
        found.mistakes.append(_empty(subset))
    if subset.mask_folder is not None and found.images:
        _pair_masks(subset.mask_folder, subset, directories, extensions, found)
    return found


def title(subset: SubsetSpec) -> str:
    """What a subset is called in notes and mistakes."""
    return str(subset.metadata_file if subset.image_dir is None else subset.image_dir)


def setting(subset: SubsetSpec, name: str, value: str) -> str:
    """How the user writes a setting where this subset was described."""
    return f"--{name}={value}" if subset.origin.startswith("--") else f'{name} = "{value}" ({subset.origin})'


def _empty(subset: SubsetSpec) -> Mistake:
    if subset.metadata_file is not None:
        return Mistake(f"metadata file {subset.metadata_file} lists no image ({subset.origin})", "write some into it")
    kind = "regularisation folder" if subset.is_reg else "folder"
    place = "" if subset.origin.startswith("--") else f" ({subset.origin})"
    return Mistake(f"{kind} {subset.image_dir} holds no image{place}", "put images into it, or remove it")


def _own_folder(image_dir: Path) -> Path:
    """With a name of its own: draws are keyed by it."""
    return image_dir if image_dir.name not in ("", "..") else Path(absolute(image_dir))


def _below(
    folder: Path, what: str, subset: SubsetSpec, directories: Directories, found: Gathered
) -> list[tuple[str, Directory]]:
    try:
        return directories.below(absolute(folder), recursive=subset.recursive)
    except FileNotFoundError:
        found.mistakes.append(Mistake(f"there is no {what} {folder} ({subset.origin})", "check the path"))
    except NotADirectoryError:
        found.mistakes.append(Mistake(f"{what} {folder} is a file ({subset.origin})", "give the folder it lies in"))
    except (OSError, ValueError) as error:
        found.mistakes.append(Mistake(f"{what} {folder} cannot be read: {error}", f"see {subset.origin}"))
    return []


def _from_folder(subset: SubsetSpec, directories: Directories, extensions: Collection[str], found: Gathered) -> None:
    if subset.image_folder is None:
        found.mistakes.append(Mistake(f"{subset.origin} names no folder", "set image_dir"))
        return
    folder = _own_folder(subset.image_folder)
    listed = _below(subset.image_folder, "folder", subset, directories, found)
    from_files = subset.caption_source == "files"
    for prefix, directory in listed:
        captions = CaptionFiles(directory.texts, subset.caption_extensions) if from_files and directory.texts else None
        for name in directory.images:
            caption_file = captions.find(stem(name)) if captions else None
            found.images.append(ImageFile(folder, prefix + name, directory, name, caption_file))
        found.lost += [(folder / (prefix + name), why) for name, why in directory.lost_images.items()]
        if from_files:
            found.mistakes += [
                Mistake(f"caption file {folder / (prefix + name)}: {why}", "mend or remove it")
                for name, why in directory.lost_texts.items()
            ]
    found.images.sort(key=lambda image: image.name)
    _note_left_behind(subset, [directory for _, directory in listed], extensions, found)
    if from_files and (missed := _other_ending(subset, found.images)) is not None:
        found.mistakes.append(missed)


def _note_left_behind(
    subset: SubsetSpec, directories: Sequence[Directory], extensions: Collection[str], found: Gathered
) -> None:
    folders = [name for directory in directories for name in directory.folders]
    if folders and not subset.recursive:
        found.notes.append(f"{subset.image_dir}: its {len(folders)} sub-folders are not read")
    found.notes += [
        f"{subset.image_dir}: {name} is a folder, no image" for name in folders if is_image(name, extensions)
    ]
    for ending, package in OPTIONAL_EXTENSIONS.items():
        if ending in extensions:
            continue
        if count := sum(name.lower().endswith(ending) for directory in directories for name in directory.others):
            what = f"{subset.image_dir}: {count} {ending} images are not used; reading them needs {package}"
            found.notes.append(what)


def _other_ending(subset: SubsetSpec, images: Sequence[ImageFile]) -> Mistake | None:
    """Captions under another ending than the one asked for: the class word alone would be trained, unsaid."""
    having = sum(image.caption_file is not None for image in images)
    if 2 * having >= len(images):
        return None
    asked = [normal_extension(ending) for ending in subset.caption_extensions]
    for ending in CAPTION_EXTENSIONS:
        if ending in (known.lower() for known in asked):
            continue
        files: dict[str, CaptionFiles] = {}
        other = 0
        for image in images:
            directory = image.directory
            if directory.path not in files:
                files[directory.path] = CaptionFiles(directory.names(), ending)
            other += files[directory.path].find(stem(image.base)) is not None
        if other > having:
            return Mistake(
                f"{subset.image_dir}: {having} of {len(images)} images have a {' or '.join(asked)} file, "
                f"{other} have a {ending} file",
                f"set {setting(subset, 'caption_extension', ending)}; to train on "
                f"{'the folder name' if subset.origin.startswith('--') else 'class_tokens'} instead, "
                f"move the {ending} files away",
            )
    return None


def _from_metadata(
    subset: SubsetSpec, file: Path, directories: Directories, extensions: Collection[str], found: Gathered
) -> None:
    try:
        metadata = read_metadata(file, subset.captions)
    except UserError as error:
        found.mistakes.extend(error.mistakes)
        return
    image_dir = subset.image_folder
    if image_dir is not None and not image_dir.is_dir():
        found.mistakes.append(Mistake(f"there is no folder {image_dir} ({subset.origin})", "check the path"))
        return
    locator = Locator.of(directories, image_dir, extensions)
    root = None if image_dir is None else absolute(image_dir)
    own = None if image_dir is None else _own_folder(image_dir)
    folders: dict[str, tuple[Path, str]] = {}  # of a directory: the folder that names are in, and the way from there
    seen: set[tuple[str, str]] = set()
    twice = metadata.twice
    for key, caption in metadata.captions.items():
        located = locator.find(key)
        if isinstance(located, str):
            found.lost.append((Path(key) if own is None else own / key, f"listed in {file.name}, but {located}"))
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
        found.images.append(ImageFile(folder, prefix + base, directory, base, None, caption, score))
    found.images.sort(key=lambda image: (str(image.folder), image.name))
    if twice:
        found.notes.append(f"{file}: {twice} images are listed twice and used once")
    if root is not None and not found.lost:
        _note_unlisted(file, directories.one(root), seen, extensions, found)


def _relative(path: str, root: str | None, own: Path | None) -> tuple[Path, str]:
    if root is not None and own is not None:
        if path == root:
            return own, ""
        if path.startswith(os.path.join(root, "")):
            return own, path[len(os.path.join(root, "")) :].replace(os.sep, "/") + "/"
    return Path(path), ""


def _note_unlisted(
    file: Path, directory: Directory, seen: set[tuple[str, str]], extensions: Collection[str], found: Gathered
) -> None:
    unlisted = sum((directory.path, name) not in seen for name in directory.images)
    if unlisted:
        found.notes.append(f"{directory.path}: {unlisted} images are not used, as {file.name} does not list them")


def _pair_masks(
    mask_dir: Path, subset: SubsetSpec, directories: Directories, extensions: Collection[str], found: Gathered
) -> None:
    listed = _below(mask_dir, "folder of masks", subset, directories, found)
    if not listed:
        return
    places = {prefix + name: (directory, name) for prefix, directory in listed for name in directory.images}
    found.masks, found.spare_masks = find_masks((image.name for image in found.images), places)
    found.mask_places = {name: places[name] for name in found.masks.values()}
    missing = sum(image.name not in found.masks for image in found.images)
    if missing:
        what = f"{title(subset)}: {missing} of {len(found.images)} images have no mask in {mask_dir}"
        found.notes.append(f"{what} and count {'by their transparency, or fully' if subset.alpha_mask else 'fully'}")


def judge_masks(subsets: Sequence[SubsetSpec], gathered: Sequence[Gathered]) -> None:
    """What only all subsets with one folder of masks tell of it: that it has none for them, and masks left over. The
    command line names one folder for all folders of images, of which some may have no masks."""
    sharing: dict[str, list[int]] = {}
    for number, (subset, found) in enumerate(zip(subsets, gathered, strict=True)):
        if subset.mask_folder is not None and found.spare_masks is not None:
            sharing.setdefault(absolute(subset.mask_folder), []).append(number)
    for numbers in sharing.values():
        found = gathered[numbers[0]]
        used = any(gathered[number].masks for number in numbers)
        for number in numbers:
            subset = subsets[number]
            by_flag = subset.origin.startswith("--")
            if gathered[number].masks or (by_flag and (used or number != numbers[0])):
                continue
            what = f"{subset.mask_dir} holds no mask for any image of {title(subset)} ({subset.origin})"
            found.mistakes.append(Mistake(what, "masks have the names of their images, with any ending"))
        spare = sorted(set.intersection(*(set(gathered[number].spare_masks or ()) for number in numbers)))
        if used and spare:
            some = ", ".join(spare[:5]) + (", ..." if len(spare) > 5 else "")
            mask_dir = subsets[numbers[0]].mask_dir
            found.notes.append(f"{mask_dir}: {len(spare)} masks belong to no image: {some}")
