"""Decide which masks are made of what, before an image is decoded or a weight loaded. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.data.image_files import BadImage, readable_extensions
from library.data.scan.image_headers import read_header
from library.data.scan.listing import Directories, Directory, absolute
from library.data.scan.pairing import composed, is_mask_label
from library.mask_making.boxes import Box, check_boxes, read_boxes
from library.mask_making.mask_files import name_masks
from library.mask_making.options import TOLERANCE, MaskMakingOptions
from library.mask_making.text_models import TextModel, choose_model
from library.messages import counted, listed
from library.options.mistakes import Mistakes

SHEET = "masks.html"
_MOST_LISTED = 10
_VERSION = 1  # of the masks: raise it when the same settings give another mask

Places = Sequence[tuple[str, Directory]]


@dataclass(frozen=True)
class MaskJob:
    """An image, upright (width, height), and its mask. `name` is relative to the folder, with "/"."""

    name: str
    image: Path
    size: tuple[int, int]
    mask: Path
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class MaskPlan:
    """All masks, sorted by name, and what makes them. `settings`: what decides them all, for their records."""

    jobs: tuple[MaskJob, ...]
    model: TextModel | None
    settings: Mapping[str, Any]
    sheet: Path

    def settings_of(self, job: MaskJob) -> dict[str, Any]:
        """What decides the mask of a job, besides its image, as JSON gives it back."""
        found: dict[str, Any] = json.loads(json.dumps({**self.settings, "boxes": job.boxes}))
        return found


def decide(options: MaskMakingOptions) -> MaskPlan:
    """Read the folders, the headers of all images, the boxes and what the model is. Raises UserError with every
    mistake."""
    mistakes = Mistakes()
    model = choose_model(options, mistakes)
    boxes = read_boxes(options.boxes, mistakes) if options.boxes is not None else {}
    directories = Directories(readable_extensions())
    names = _list_images(options, directories, mistakes)
    sizes = _sizes(options, names, mistakes)
    if options.boxes is not None and names:
        check_boxes(options.boxes, boxes, {composed(name): size for name, size in sizes.items()}, mistakes)
    masks = _name(options, directories, names, mistakes)
    mistakes.raise_if_any()
    jobs = tuple(
        MaskJob(
            name,
            options.input_dir / name,
            sizes[name],
            options.output_dir / masks[name],
            boxes.get(composed(name), ()),
        )
        for name in names
    )
    return MaskPlan(jobs, model, _settings(options, model), options.output_dir / SHEET)


def _settings(options: MaskMakingOptions, model: TextModel | None) -> dict[str, Any]:
    tolerance = TOLERANCE if options.color_tolerance is None else options.color_tolerance
    return {
        "version": _VERSION,
        "model": None if model is None else model.identity(),
        "alpha": options.alpha,
        "colours": options.colours,
        "tolerance": tolerance if options.colours else None,
        "grabcut": options.grabcut,
        "min_area": options.min_area,
        "padding": options.mask_padding,
        "blur": options.mask_blur,
        "invert": options.invert_mask,
    }


def _list_images(options: MaskMakingOptions, directories: Directories, mistakes: Mistakes) -> list[str]:
    """Names of the images, sorted; masks beside them are none. Adds mistakes."""
    folder = options.input_dir
    try:
        places = directories.below(absolute(folder), recursive=options.recursive)
    except FileNotFoundError:
        mistakes.add(f"--input_dir {folder}: there is no such folder", "check the path")
        return []
    except NotADirectoryError:
        mistakes.add(f"--input_dir {folder} is a file", "give the folder that contains it")
        return []
    except OSError as error:
        mistakes.add(f"--input_dir {folder} cannot be read ({error.strerror or error})", "check its permissions")
        return []
    unusable = {prefix + name: why for prefix, place in places for name, why in place.unusable_images.items()}
    names = sorted(prefix + name for prefix, place in places for name in place.images if not is_mask_label(name))
    _report_unusable(unusable, mistakes)
    if not names and not unusable:
        mistakes.add(f"--input_dir {folder} contains no image", _instead(places, directories))
    return names


def _instead(places: Places, directories: Directories) -> str:
    """What to do if a folder contains no image: its sub-folders may."""
    root = places[0][1]
    for name in sorted(root.folders) if len(places) == 1 else ():
        path = os.path.join(root.path, name)
        try:
            inside = directories.get(path).images
        except OSError:
            continue
        if inside:
            return f"give its sub-folder {name!r}, which contains {counted(len(inside), 'image')}, or add --recursive"
    return "add images, or give another folder"


def _sizes(options: MaskMakingOptions, names: Sequence[str], mistakes: Mistakes) -> dict[str, tuple[int, int]]:
    """Upright size of each image. Adds one mistake about all images that cannot be read."""
    sizes: dict[str, tuple[int, int]] = {}
    bad: dict[str, str] = {}
    for name in names:
        try:
            sizes[name] = read_header(options.input_dir / name, options.max_image_memory).size
        except BadImage as error:
            bad[name] = str(error)
    _report_unusable(bad, mistakes)
    return sizes


def _report_unusable(reasons: Mapping[str, str], mistakes: Mistakes) -> None:
    if reasons:
        lines = listed((f"\n    {name}: {why}" for name, why in reasons.items()), _MOST_LISTED, "")
        mistakes.add(f"{counted(len(reasons), 'image')} cannot be used:{lines}", "repair or remove them")


def _name(
    options: MaskMakingOptions, directories: Directories, names: Sequence[str], mistakes: Mistakes
) -> dict[str, str]:
    """The mask of each image, both relative to their folders. Adds mistakes about the folder of the masks."""
    source, target = absolute(options.input_dir), absolute(options.output_dir)
    beside = os.path.exists(target) and os.path.exists(source) and os.path.samefile(source, target)
    if options.recursive and not beside and target.startswith(os.path.join(source, "")):
        what = f"--output_dir {options.output_dir} is in --input_dir, whose sub-folders are read too"
        mistakes.add(what, "choose a folder elsewhere, or --input_dir itself")
        return {}
    existing: list[str] = []
    if (reason := _not_writable(target)) is not None:
        mistakes.add(f"--output_dir {options.output_dir} {reason}", "choose another folder")
        return {}
    if os.path.exists(target):
        try:
            places = directories.below(target, recursive=options.recursive)
        except OSError as error:
            what = f"--output_dir {options.output_dir} cannot be read ({error.strerror or error})"
            mistakes.add(what, "choose another folder")
            return {}
        existing = [prefix + name for prefix, place in places for name in place.images]
        existing = [name for name in existing if not beside or is_mask_label(name)]
    masks = name_masks(names, options.output_dir, existing, mistakes, beside=beside)
    images = {os.path.realpath(options.input_dir / name) for name in names}
    over = [name for name in masks.values() if os.path.realpath(options.output_dir / name) in images]
    if over:
        what = f"masks would replace images: {listed(options.output_dir / name for name in over)}"
        mistakes.add(what, "choose another --output_dir")
    return masks


def _not_writable(folder: str) -> str | None:
    """Why no file can be written to a folder, which may not exist yet; None if nothing speaks against it."""
    nearest = folder
    while not os.path.lexists(nearest):
        nearest = os.path.dirname(nearest)
    if not os.path.isdir(nearest):
        return "is a file" if nearest == folder else f"cannot be made: {nearest} is a file"
    return None if os.access(nearest, os.W_OK) else "cannot be written: permission denied"
