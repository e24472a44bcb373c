"""A folder of class images, drawn by the base model and numbered: what it lacks is drawn, what stands there is kept.

    reg/1_dog/
      class_00001.png     image i: prompt i modulo the prompts, seed --seed + i - 1 (or the prompt's own, counting up)
      class_00001.txt     its prompt, with --write_captions
      class_images.jsonl  the record: a line for each image, all that it was made of

The record is written before the first image, and each file whole or not at all. So whenever a call is stopped, the
next one knows what stands there; one that would draw otherwise is refused. No torch at module level.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.checkpoints.files import read_part_header, sha256
from library.checkpoints.header import CheckpointError, Header
from library.checkpoints.writer import write_text
from library.options.mistakes import Mistake, UserError
from library.sampling.draw_command import Drawing, decide, draw, load, make_folder, write_image
from library.sampling.generate import random_seed
from library.sampling.options import ClassImageOptions
from library.sampling.prompts import ImageRequest

RECORD = "class_images.jsonl"
_IMAGE = re.compile(r"class_\d{5,}\.png")
_HALF_WRITTEN = re.compile(rf"(class_\d{{5,}}\.\w+|{re.escape(RECORD)})\.\d+\.tmp")
_NAMES = ("model", "vae")  # files may be renamed: their hashes are compared

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class ClassFolder:
    """A class folder as it is and as it shall be.

    `images` and `record` (a line each) are of all images, from the first: those asked for, or those recorded if
    they are more. `missing` are the places of images, `captions` of caption files, among those asked for.
    """

    path: Path
    requests: Sequence[ImageRequest]
    record: Sequence[Entry]
    recorded: int  # lines that the record has now
    missing: Sequence[int]
    captions: Sequence[int]


def fill_folder(options: ClassImageOptions) -> None:
    """Draw what the folder of --outdir lacks, and say so. Raises UserError: wrong options, images drawn otherwise."""
    drawing = decide(options)
    for note in drawing.notes:
        print(note)
    folder = look_into(options, drawing)
    print(describe(folder, options.count), flush=True)
    if options.dry_run:
        print("dry run: no weight was loaded and nothing was written")
        return
    if not folder.missing and not folder.captions:
        return
    make_folder(folder.path)
    for left in _half_written(folder.path):
        with contextlib.suppress(OSError):
            left.unlink()
    if len(folder.record) > folder.recorded:
        _write(folder.path / RECORD, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in folder.record))
    for place in folder.captions:
        _write(_caption_path(folder.path, place, options), folder.requests[place].prompt + "\n")
    if folder.missing:
        _draw_missing(options, drawing, folder)


def _draw_missing(options: ClassImageOptions, drawing: Drawing, folder: ClassFolder) -> None:
    requests = [folder.requests[place] for place in folder.missing]
    model = load(options, drawing)
    for done, image in enumerate(draw(options, model, requests), start=1):
        path = folder.path / file_name(folder.missing[done - 1])
        write_image(path, requests[done - 1], image)
        print(f"[{done}/{len(requests)}] {path}", flush=True)
    print(f"{options.count} images in {folder.path}")


def look_into(options: ClassImageOptions, drawing: Drawing) -> ClassFolder:
    """What stands in the folder of --outdir and what it lacks; nothing is written. Raises UserError."""
    path = options.outdir or Path()
    names = _names(path)
    recorded = _read_record(path / RECORD) if RECORD in names else []
    _refuse_unknown(path, names, recorded)
    seed = options.seed if options.seed is not None else _recorded_seed(recorded, drawing.prompts)
    requests = with_seeds(drawing.prompts, random_seed() if seed is None else seed, max(options.count, len(recorded)))
    shared = _shared_facts(options, drawing)
    record = [_entry(place, request) | shared for place, request in enumerate(requests)]
    _refuse_other_settings(path, recorded, record)
    missing = [place for place in range(options.count) if file_name(place) not in names]
    captions = []
    if options.write_captions:
        captions = [place for place in range(options.count) if _caption_path(path, place, options).name not in names]
    return ClassFolder(path, requests, record, len(recorded), missing, captions)


def file_name(place: int) -> str:
    """`class_00001.png` for the first image, place 0."""
    return f"class_{place + 1:05d}.png"


def with_seeds(prompts: Sequence[ImageRequest], seed: int, count: int) -> list[ImageRequest]:
    """The first `count` images, each with its seed: prompts in turn, so that a larger count only adds images."""
    requests = []
    for place in range(count):
        prompt, turn = prompts[place % len(prompts)], place // len(prompts)
        requests.append(replace(prompt, seed=seed + place if prompt.seed is None else prompt.seed + turn))
    return requests


def describe(folder: ClassFolder, count: int) -> str:
    """What is there and what is missing, for the user."""
    there = f"{folder.path}: {count - len(folder.missing)} of {count} images are there"
    lines = [f"{there}, {len(folder.missing)} to draw" if folder.missing else f"{there}, nothing to draw"]
    kinds: dict[tuple[object, ...], int] = {}
    for place in folder.missing:
        one = folder.requests[place]
        kind = (one.prompt, f"{one.width}x{one.height}", one.sampler, f"{one.steps} steps", f"scale {one.scale:g}")
        kinds[kind] = kinds.get(kind, 0) + 1
    lines += [f"  {number} x {', '.join(map(str, kind))}" for kind, number in kinds.items()]
    if folder.captions:
        lines.append(f"  {len(folder.captions)} captions to write")
    return "\n".join(lines)


def _names(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return set()
    except OSError as error:
        what = f"--outdir {folder} cannot be read ({error.strerror or error})"
        raise UserError([Mistake(what, "choose another folder")]) from error


def _half_written(folder: Path) -> list[Path]:
    """What a process that was killed left of a file."""
    return [path for path in folder.iterdir() if _HALF_WRITTEN.fullmatch(path.name)]


def _caption_path(folder: Path, place: int, options: ClassImageOptions) -> Path:
    return folder / f"{Path(file_name(place)).stem}.{options.caption_extension.removeprefix('.')}"


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except CheckpointError as error:
        raise UserError([Mistake(str(error))]) from error


def _read_record(path: Path) -> list[Entry]:
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if all(isinstance(entry["file"], str) and isinstance(entry["seed"], int) for entry in entries):
            return entries
        reason = "a line names no file and seed"
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error)
    what = f"{path}, which tells what the images beside it were made of, cannot be read ({reason})"
    raise UserError([Mistake(what, "choose another --outdir, or remove the folder to draw it anew")])


def _recorded_seed(recorded: Sequence[Entry], prompts: Sequence[ImageRequest]) -> int | None:
    """The --seed of an earlier call: that of any image whose prompt has none of its own, less its place."""
    for place, entry in enumerate(recorded):
        if prompts[place % len(prompts)].seed is None:
            seed: int = entry["seed"]
            return max(0, seed - place)
    return None


def _entry(place: int, request: ImageRequest) -> dict[str, Any]:
    return {
        "file": file_name(place),
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "width": request.width,
        "height": request.height,
        "sampler": request.sampler,
        "steps": request.steps,
        "scale": request.scale,
    }


def _shared_facts(options: ClassImageOptions, drawing: Drawing) -> dict[str, Any]:
    precision = "fp16" if options.fp16 else "bf16" if options.bf16 else "fp32"
    return {
        "model": drawing.header.path.name,
        "model_sha256": _content_hash(drawing.header),
        "vae": drawing.vae.name if drawing.vae is not None else None,
        "vae_sha256": _content_hash(read_part_header(drawing.vae)) if drawing.vae is not None else None,
        "prediction": drawing.prediction,
        "clip_skip": options.clip_skip or 1,
        "max_embeddings_multiples": options.max_embeddings_multiples,
        "precision": precision + (" (VAE fp32)" if drawing.vae_in_full(options) and precision != "fp32" else ""),
    }


def _content_hash(header: Header) -> str:
    """SHA-256 of a model file; of a folder, of the hashes of its weight files under their names."""
    files = sorted({place.file for place in header.places.values()})
    if files == [header.path]:
        return sha256(header.path)
    lines = [f"{file.relative_to(header.path).as_posix()} {sha256(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()


def _refuse_unknown(folder: Path, names: set[str], recorded: Sequence[Entry]) -> None:
    unknown = sorted(name for name in names - {entry["file"] for entry in recorded} if _IMAGE.fullmatch(name))
    if unknown:
        what = f"--outdir {folder}: {RECORD} does not tell what {unknown[0]} was made of"
        more = f" (nor {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise UserError([Mistake(what + more, "choose another --outdir, or move these images away")])


def _refuse_other_settings(folder: Path, recorded: Sequence[Entry], record: Sequence[Entry]) -> None:
    """Raise UserError if this call would draw a recorded image otherwise; it names each setting once."""
    differences: dict[str, str] = {}
    for was, now in zip(recorded, record[: len(recorded)], strict=True):
        for key, value in now.items():
            if key not in _NAMES and was.get(key) != value:
                told = f"  {key}: {was.get(key)!r} there, {value!r} now ({was['file']})"
                differences.setdefault(key, told)
    if differences:
        what = f"--outdir {folder} holds images that were drawn otherwise:\n" + "\n".join(differences.values())
        raise UserError([Mistake(what, f"give the settings that {folder / RECORD} tells, or choose another --outdir")])
