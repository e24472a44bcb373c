"""Notes about files in a subset's folders that are not used: other formats, captions and masks without an image."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from library.data.image_files import OPTIONAL_EXTENSIONS
from library.data.scan.caption_files import normal_extension
from library.data.scan.listing import Directory, is_image, stem
from library.data.scan.pairing import folded
from library.messages import counted
from library.options.datasets import SubsetSpec

Places = Sequence[tuple[str, Directory]]
"""The folders of a subset, each with the prefix of names in it: "" or ending in "/"."""

CAPTION_EXTENSIONS = (".txt", ".caption")  # the usual extensions

_SAVE = "save each as PNG or JPEG to train on it"
_FRAMES = "save the frames to train on as images"
_OTHER_FORMATS = {
    **dict.fromkeys(
        (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi", ".wmv", ".flv", ".mpg", ".mpeg", ".gifv", ".3gp"), _FRAMES
    ),
    **dict.fromkeys(
        (".psd", ".psb", ".xcf", ".kra", ".clip", ".ora", ".afphoto", ".procreate", ".svg", ".svgz", ".ai", ".eps",
         ".ps", ".pdf", ".wmf", ".emf", ".ico", ".icns", ".cur", ".exr", ".hdr", ".jxr", ".webarchive", ".dng", ".cr2",
         ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".raf", ".orf", ".rw2", ".pef", ".srw", ".x3f"), _SAVE
    ),
}  # fmt: skip
_CACHES = (".npz", ".safetensors")  # latents and text encoder outputs, named like their images
_SOURCES = {"metadata": "the metadata file", "class_tokens": "one text for all", "file_name": "the file names"}


def note_folders(subset: SubsetSpec, places: Places, extensions: Collection[str]) -> list[str]:
    """Notes about sub-folders that are not read."""
    folders = [name for _, directory in places for name in directory.folders]
    notes = []
    if folders and not subset.recursive:
        notes.append(f"{subset.image_dir}: {counted(len(folders), 'sub-folder')} not read")
    return notes + [
        f"{subset.image_dir}: {name} is a folder, not an image" for name in folders if is_image(name, extensions)
    ]


def note_formats(place: object, places: Places, extensions: Collection[str]) -> list[str]:
    """A note for each image or video format that is not read, with an example and what to do. `place`: the subset's
    name in notes."""
    by_ending: dict[str, list[str]] = {}
    for prefix, directory in places:
        for name in directory.others:
            ending = name[name.rfind(".") :].lower()
            if ending not in extensions and (ending in OPTIONAL_EXTENSIONS or ending in _OTHER_FORMATS):
                by_ending.setdefault(ending, []).append(prefix + name)
    notes = []
    for ending, names in sorted(by_ending.items()):
        if ending in OPTIONAL_EXTENSIONS:
            kind, remedy = "image", f"install {OPTIONAL_EXTENSIONS[ending]} to read them"
        else:
            kind, remedy = "file", _OTHER_FORMATS[ending]
        notes.append(f"{place}: {_some(names, f'{ending} {kind}')} not used; {remedy}")
    return notes


def note_captions(
    place: object,
    subset: SubsetSpec,
    places: Places,
    images: Mapping[str, Sequence[str]],
    used: Mapping[str, Collection[str]],
) -> list[str]:
    """Notes about caption files that are not used, and why.

    `images` and `used`: file names of the images and of their caption files by the path of their folder.
    """
    without_image: list[str] = []
    second: list[str] = []
    other: dict[str, list[str]] = {}  # ending -> files
    own = [normal_extension(ending).lower() for ending in subset.caption_extensions]
    own = own if subset.caption_source == "files" else []
    endings = tuple(dict.fromkeys((*own, *CAPTION_EXTENSIONS)))
    sidecars: list[str] = []
    for prefix, directory in places:
        mine = used.get(directory.path, ())
        spare = sorted(name for name in directory.names() if name not in mine)
        captions = [name for name in spare if name.lower().endswith(endings)]
        here = images.get(directory.path, ())
        paired = _named_like_images(captions, endings, here)
        for name in captions:
            ending = next(ending for ending in endings if name.lower().endswith(ending))
            if ending not in own:
                if own or name in paired:
                    other.setdefault(ending, []).append(prefix + name)
            else:
                (second if name in paired else without_image).append(prefix + name)
        sidecars += [prefix + name for name in _sidecars(spare, endings, here)]
    notes = []
    if without_image:
        notes.append(f"{place}: {_some(without_image, 'caption file')} without an image")
    if second:
        notes.append(f"{place}: {_some(second, 'caption file')} not used, because their images have another")
    for ending, names in other.items():
        source = f"{' or '.join(own)} files" if own else _SOURCES[subset.caption_source]
        notes.append(f"{place}: {_some(names, f'{ending} file')} not used; captions are from {source}")
    if sidecars:
        notes.append(f"{place}: {_some(sidecars, 'other file')} named like images not used")
    return notes


def note_mask_labels(labels: Sequence[str], place: Path, flags: str) -> list[str]:
    """A note about masks beside their images that no option asks for. `flags`: how to ask for them."""
    if not labels:
        return []
    return [f"{place}: {_some(labels, 'mask')} beside the images not used as image or mask; to use them set {flags}"]


def _some(names: Sequence[str], noun: str) -> str:
    """How many files, and an example."""
    return f"{counted(len(names), noun)} ({'for example ' if len(names) > 1 else ''}{names[0]})"


def _named_like_images(captions: Iterable[str], endings: Sequence[str], images: Iterable[str]) -> set[str]:
    """Caption files that belong to an image by name, whether or not it has another."""
    names = _image_names(images)
    found = set()
    for caption in captions:
        before = [caption[: -len(ending)] for ending in endings if caption.lower().endswith(ending)]
        if any(folded(name) in names for name in before):
            found.add(caption)
    return found


def _sidecars(names: Iterable[str], endings: Sequence[str], images: Sequence[str]) -> list[str]:
    """Files of other kinds that are named like images: robot_1.json, robot_1.png.json."""
    image_names = _image_names(images)
    known = (*endings, *_CACHES, *OPTIONAL_EXTENSIONS, *_OTHER_FORMATS)
    return [
        name for name in names if not name.lower().endswith(known) and "." in name and folded(stem(name)) in image_names
    ]


def _image_names(images: Iterable[str]) -> set[str]:
    return {folded(name) for image in images for name in (stem(image), image)}
