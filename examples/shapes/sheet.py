"""Draw the sheet: images of some prompts before and after the training, one row per prompt, with the same seeds.

python -m examples.shapes.sheet output/shapes/robot.safetensors output/shapes/sheet.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from examples.shapes.draw_subject import FOLDER, NAME
from examples.shapes.evaluate import BASE, CLASS_PROMPT, NEW_BACKGROUNDS
from examples.shapes.images import draw, open_model
from examples.shapes.world import SIDE, Pixels, article
from library.checkpoints.writer import replacing
from library.families.family import Model

ACROSS = 6  # images of a row, before and after each
GAP, LINE = 6, 18  # pixels between images, and of a line of text
PAPER, INK = "white", "black"

Rows = Sequence[Sequence[Pixels]]
"""The images of each row."""


@dataclass(frozen=True)
class Row:
    """A prompt, and the seeds of its images."""

    prompt: str
    first_seed: int


ROWS = (
    *(Row(f"{NAME} on {article(background)} background", 100) for background in NEW_BACKGROUNDS),
    Row(CLASS_PROMPT, 200),
    Row("a sad red robot with one eye on a yellow background", 300),
    Row("a blue star on a yellow background", 400),
)


def sheet(before: Rows, after: Rows, subject: Sequence[Pixels]) -> Image.Image:
    """The images of every row, before on the left and after on the right, under the subject's own images."""
    block = ACROSS * (SIDE + GAP)
    size = (2 * block + 3 * GAP, GAP + (1 + len(ROWS)) * (LINE + SIDE + GAP) + LINE)
    paper = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(paper), ImageFont.load_default(size=13)

    def strip(images: Sequence[Pixels], left: int, top: int) -> None:
        for column, image in enumerate(images):
            paper.paste(Image.fromarray(image), (left + column * (SIDE + GAP), top))

    top = GAP
    pen.text((GAP, top), f'the six images: "{NAME}"', fill=INK, font=font)
    strip(subject, GAP, top + LINE)
    top += LINE + SIDE + GAP
    right = block + 2 * GAP
    pen.text((GAP, top), "BEFORE", fill=INK, font=font)
    pen.text((right, top), "AFTER", fill=INK, font=font)
    top += LINE
    for row, old, new in zip(ROWS, before, after, strict=True):
        pen.text((GAP, top), f'"{row.prompt}"', fill=INK, font=font)
        strip(old, GAP, top + LINE)
        strip(new, right, top + LINE)
        top += LINE + SIDE + GAP
    return paper


def draw_rows(model: Model) -> list[list[Pixels]]:
    """The images of all rows by a model."""
    prompts = [row.prompt for row in ROWS for _ in range(ACROSS)]
    seeds = [row.first_seed + column for row in ROWS for column in range(ACROSS)]
    images = draw(model, prompts, seeds)
    return [images[start : start + ACROSS] for start in range(0, len(images), ACROSS)]


def draw_sheet(base: Model, trained: Model, path: Path) -> None:
    """Draw the rows before and after a training and write them as a .png file."""
    subject = [np.asarray(Image.open(image).convert("RGB")) for image in sorted(FOLDER.glob("*.png"))]
    paper = sheet(draw_rows(base), draw_rows(trained), subject)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as stream:
        paper.save(stream, "png", optimize=True)


def draw_ways(models: Mapping[str, Callable[[], Model]], path: Path) -> None:
    """Write a .png file with a row for each model under its name: images of the subject, and of its class, with the
    same seeds in all rows."""
    prompts = [f"{NAME} on {article(background)} background" for background in NEW_BACKGROUNDS]
    prompts += [CLASS_PROMPT] * (2 * ACROSS)
    paper = Image.new("RGB", (GAP + len(prompts) * (SIDE + GAP), GAP + len(models) * (LINE + SIDE + GAP)), PAPER)
    pen, font = ImageDraw.Draw(paper), ImageFont.load_default(size=13)
    for row, (name, opened) in enumerate(models.items()):
        top = GAP + row * (LINE + SIDE + GAP)
        pen.text((GAP, top), name, fill=INK, font=font)
        for column, image in enumerate(draw(opened(), prompts, range(100, 100 + len(prompts)))):
            paper.paste(Image.fromarray(image), (GAP + column * (SIDE + GAP), top + LINE))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as stream:
        paper.save(stream, "png", optimize=True)


def main() -> None:
    """Read the command line and write the sheet."""
    parser = argparse.ArgumentParser(description="Draw a sheet of images before and after a training.")
    parser.add_argument("trained", type=Path, help="the trained model")
    parser.add_argument("sheet", type=Path, help="the .png file to write")
    parser.add_argument("--base", type=Path, default=BASE, help="the model that it was trained from")
    options = parser.parse_args()
    draw_sheet(open_model(options.base), open_model(options.trained), options.sheet)


if __name__ == "__main__":
    main()
