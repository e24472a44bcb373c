"""Fill a folder with class images of the base model: missing images are drawn, existing ones kept.

    reg/1_dog/
      class_00001.png     image i: prompt i modulo the prompts, seed --seed + i - 1 (or the prompt's own, counting up)
      class_00001.txt     its prompt, with --write_captions
      class_images.jsonl  the record: one line per image with all its settings

The record is written before the first image, and every file is written atomically. After an interruption the next call
knows what exists; a call with other settings is refused. No torch at module level.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.bounded import json_of
from library.checkpoints.header import CheckpointError
from library.checkpoints.writer import write_text
from library.messages import counted, listed
from library.options.mistakes import Mistake, UserError
from library.sampling.draw_command import Drawing, decide, draw, load, make_folder, open_bar
from library.sampling.generate import random_seed
from library.sampling.image_facts import differing, hashes_of_adapters, model_facts, request_facts
from library.sampling.options import ClassImageOptions
from library.sampling.prompts import ImageRequest
from library.sampling.write_image import write_image
from library.whole_files import remove_leftovers

RECORD = "class_images.jsonl"
_IMAGE = re.compile(r"class_\d{5,}\.png")

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class ClassFolder:
    """A class folder and what is missing in it.

    `requests` and `record` (its lines) cover all images, the requested and the recorded ones. `recorded`: lines already
    written. `missing` and `captions`: indices of images and caption files to write.
    """

    path: Path
    requests: Sequence[ImageRequest]
    record: Sequence[Entry]
    recorded: int
    missing: Sequence[int]
    captions: Sequence[int]


def fill_folder(options: ClassImageOptions) -> None:
    """Draw the missing images of --outdir. Raises UserError: wrong options, existing images with other settings."""
    drawing = decide(options)
    for note in drawing.notes:
        print(note)
    folder = inspect_folder(options, drawing)
    print(describe(folder, options.count), flush=True)
    if options.dry_run:
        print("dry run: no weights were loaded and nothing was written")
        return
    if not folder.missing and not folder.captions:
        return
    make_folder(folder.path)
    remove_leftovers(folder.path)
    if len(folder.record) > folder.recorded:
        _write(folder.path / RECORD, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in folder.record))
    for place in folder.captions:
        _write(_caption_path(folder.path, place, options), folder.requests[place].prompt + "\n")
    if folder.missing:
        _draw_missing(options, drawing, folder)


def _draw_missing(options: ClassImageOptions, drawing: Drawing, folder: ClassFolder) -> None:
    requests = [folder.requests[place] for place in folder.missing]
    model = load(options, drawing)
    with open_bar(model, requests) as bar:
        for done, image in enumerate(draw(options, model, requests, bar=bar), start=1):
            path = folder.path / file_name(folder.missing[done - 1])
            write_image(path, requests[done - 1], image)
            with bar.making_room():
                print(f"[{done}/{len(requests)}] {path}", flush=True)
    print(f"{counted(options.count, 'image')} in {folder.path}")


def inspect_folder(options: ClassImageOptions, drawing: Drawing) -> ClassFolder:
    """Compare the folder of --outdir with the options; nothing is written. Raises UserError."""
    path = options.outdir or Path()
    names = _names(path)
    recorded = _read_record(path / RECORD) if RECORD in names else []
    _check_unrecorded(path, names, recorded)
    seed = options.seed if options.seed is not None else _recorded_seed(recorded, drawing.prompts)
    requests = with_seeds(drawing.prompts, random_seed() if seed is None else seed, max(options.count, len(recorded)))
    shared = model_facts(options, drawing)
    hashes = hashes_of_adapters(drawing.prompts)
    record = [_entry(place, request, hashes) | shared for place, request in enumerate(requests)]
    _check_settings(path, recorded, record)
    missing = [place for place in range(options.count) if file_name(place) not in names]
    captions = []
    if options.write_captions:
        captions = [place for place in range(options.count) if _caption_path(path, place, options).name not in names]
    return ClassFolder(path, requests, record, len(recorded), missing, captions)


def file_name(place: int) -> str:
    """Return `class_00001.png` for the image at index 0."""
    return f"class_{place + 1:05d}.png"


def with_seeds(prompts: Sequence[ImageRequest], seed: int, count: int) -> list[ImageRequest]:
    """Return the first `count` images with their seeds, prompts in turn; a larger count only adds images."""
    requests = []
    for place in range(count):
        prompt, turn = prompts[place % len(prompts)], place // len(prompts)
        requests.append(replace(prompt, seed=seed + place if prompt.seed is None else prompt.seed + turn))
    return requests


def describe(folder: ClassFolder, count: int) -> str:
    """Describe what exists and what is missing."""
    existing = f"{folder.path}: {count - len(folder.missing)} of {count} images exist"
    lines = [f"{existing}, {len(folder.missing)} to draw" if folder.missing else f"{existing}, nothing to draw"]
    kinds: dict[tuple[object, ...], int] = {}
    for place in folder.missing:
        request = folder.requests[place]
        size = f"{request.width}x{request.height}"
        settings = (size, request.sampler, counted(request.steps, "step"), f"scale {request.scale:g}")
        kind = (request.prompt, *settings, *request.adapters)
        kinds[kind] = kinds.get(kind, 0) + 1
    lines += [f"  {number} x {', '.join(map(str, kind))}" for kind, number in kinds.items()]
    if folder.captions:
        lines.append(f"  {counted(len(folder.captions), 'caption')} to write")
    return "\n".join(lines)


def _names(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return set()
    except OSError as error:
        what = f"--outdir {folder} cannot be read ({error.strerror or error})"
        raise UserError([Mistake(what, "choose another folder")]) from error


def _caption_path(folder: Path, place: int, options: ClassImageOptions) -> Path:
    return folder / f"{Path(file_name(place)).stem}.{options.caption_extension.removeprefix('.')}"


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except CheckpointError as error:
        raise UserError([Mistake(str(error))]) from error


def _read_record(path: Path) -> list[Entry]:
    try:
        entries = [json_of(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if all(isinstance(entry["file"], str) and isinstance(entry["seed"], int) for entry in entries):
            return entries
        reason = "a line has no file or no seed"
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error)
    what = f"{path}, the record of the images beside it, cannot be read ({reason})"
    raise UserError([Mistake(what, "choose another --outdir, or remove the folder to start again")])


def _recorded_seed(recorded: Sequence[Entry], prompts: Sequence[ImageRequest]) -> int | None:
    """Return the --seed of an earlier call, from the first image whose prompt has no seed of its own."""
    for place, entry in enumerate(recorded):
        if prompts[place % len(prompts)].seed is None:
            seed: int = entry["seed"]
            return max(0, seed - place)
    return None


def _entry(place: int, request: ImageRequest, hashes: Mapping[Path, str]) -> dict[str, Any]:
    """The line of an image. `hashes`: of the adapter files."""
    return {"file": file_name(place), **request_facts(request, hashes)}


def _check_unrecorded(folder: Path, names: set[str], recorded: Sequence[Entry]) -> None:
    unknown = sorted(name for name in names - {entry["file"] for entry in recorded} if _IMAGE.fullmatch(name))
    if unknown:
        what = f"--outdir {folder} contains images that are not in {RECORD}: {listed(unknown, 1)}"
        raise UserError([Mistake(what, "choose another --outdir, or move these images away")])


def _check_settings(folder: Path, recorded: Sequence[Entry], record: Sequence[Entry]) -> None:
    """Raise UserError if a recorded image has other settings than this call; each setting is named once."""
    differences: dict[str, str] = {}
    for was, now in zip(recorded, record[: len(recorded)], strict=True):
        for key in differing(was, now):
            differences.setdefault(key, f"  {key}: {was.get(key)!r} there, {now[key]!r} now ({was['file']})")
    if differences:
        what = f"--outdir {folder} contains images with other settings:\n" + "\n".join(differences.values())
        raise UserError([Mistake(what, f"use the settings in {folder / RECORD}, or choose another --outdir")])
