"""The images that an evaluation draws, by model: what exists, what is missing, drawing. No torch at module level.

    OUTDIR/base/00_0.png        image 0 of prompt 0
    OUTDIR/base/class_00_0.png  the same of the class
    OUTDIR/base/images.json     what each image was drawn with; written before the first one

After an interruption the next call draws what is missing. Images with other settings are never mixed: that is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from library.bounded import read_json
from library.checkpoints.header import CheckpointError
from library.checkpoints.writer import write_json
from library.options.mistakes import Mistake, Mistakes, UserError
from library.sampling.draw_command import Drawing, draw, load, make_folder, open_bar
from library.sampling.image_facts import differing, hashes_of_adapters, model_facts, request_facts
from library.sampling.options import DrawingOptions
from library.sampling.prompts import ImageRequest
from library.sampling.write_image import write_image

RECORD = "images.json"


@dataclass(frozen=True)
class ModelImages:
    """A model to evaluate: its name, how it draws, and the image file of each request of `drawing`."""

    name: str
    options: DrawingOptions
    drawing: Drawing
    folder: Path
    files: Sequence[str]

    @property
    def missing(self) -> list[tuple[Path, ImageRequest]]:
        """The images that do not exist yet."""
        every = zip(self.files, self.drawing.prompts, strict=True)
        return [(self.folder / file, request) for file, request in every if not (self.folder / file).is_file()]

    def facts(self) -> dict[str, dict[str, Any]]:
        """What decides the pixels of each image, by file. Reads the model for its hash."""
        shared, hashes = model_facts(self.options, self.drawing), hashes_of_adapters(self.drawing.prompts)
        every = zip(self.files, self.drawing.prompts, strict=True)
        return {file: {**request_facts(request, hashes), **shared} for file, request in every}


def image_files(per_prompt: Sequence[int], prefix: str = "") -> list[list[str]]:
    """The file names of the images of each prompt."""
    return [[f"{prefix}{place:02d}_{copy}.png" for copy in range(count)] for place, count in enumerate(per_prompt)]


def check_record(model: ModelImages, mistakes: Mistakes) -> dict[str, Any]:
    """The record of a model's images with those of this call. Adds a mistake if an image was drawn otherwise."""
    path = model.folder / RECORD
    recorded: Mapping[str, Any] = {}
    if path.exists():
        try:
            recorded = read_json(path)
            if not all(isinstance(entry, dict) for entry in recorded.values()):
                raise ValueError("it is not a table of images")
        except (OSError, ValueError, AttributeError) as error:
            mistakes.add(f"{path} cannot be read ({error})", f"remove {model.folder} to draw its images again")
            return {}
    wanted = model.facts()
    for file, now in wanted.items():
        was = recorded.get(file)
        if was is not None and (keys := differing(was, now)):
            lines = "".join(f"\n  {key}: {was.get(key)!r} there, {now[key]!r} now" for key in keys)
            mistakes.add(
                f"{model.folder} has images with other settings ({file}):{lines}",
                f"use the same settings, choose another --outdir, or remove {model.folder}",
            )
            break
        if was is None and (model.folder / file).exists():
            mistakes.add(f"{model.folder / file} is not in {path}", "choose another --outdir, or move it away")
            break
    return {**recorded, **wanted}


def draw_missing(models: Sequence[ModelImages], records: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw what is missing; a checkpoint is loaded once for all its adapters. Raises UserError."""
    for model in models:
        make_folder(model.folder)
        try:
            write_json(model.folder / RECORD, records[model.name])
        except CheckpointError as error:
            raise UserError([Mistake(str(error))]) from error
    for _, group in groupby(models, lambda model: model.options.ckpt):
        own = list(group)
        missing = [pair for model in own for pair in model.missing]
        if not missing:
            continue
        paths, requests = zip(*missing, strict=True)
        options = own[0].options
        drawn_with = load(options, own[0].drawing)
        with open_bar(drawn_with, requests) as bar:
            for path, request, image in zip(paths, requests, draw(options, drawn_with, requests, bar=bar), strict=True):
                write_image(path, request, image)
