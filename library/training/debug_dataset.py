"""--debug_dataset: write an HTML page with the images, masks and captions that a run would train on."""

from __future__ import annotations

import os
import sys
import webbrowser
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from library.checkpoints.header import CheckpointError
from library.data.contact_sheet import Page, SheetCaption, SheetImage, write_page
from library.objective.masking import MaskSettings
from library.options.mistakes import Mistake, UserError
from library.training.inputs import build_dataset

if TYPE_CHECKING:
    from library.data.dataset import TrainingDataset
    from library.data.images import Geometry
    from library.data.masks import Mask
    from library.data.reading import ImageReader
    from library.training.plan.facts import RunFacts
    from library.training.plan.text import Section

EPOCHS = 3  # captions of these first epochs are shown
SHOWN_SECTIONS = ("model", "data", "captions", "buckets", "training", "length", "validation")  # sections of the plan


def show_dataset(facts: RunFacts, folder: Path, sections: Mapping[str, Section]) -> Path:
    """Write the page into `folder`, print its path, and open it in a browser if there is a screen. Raises UserError if
    it cannot be written."""
    dataset = build_dataset(facts)
    scan = facts.images.scan
    page = Page(
        title=facts.options.saving.output_name or folder.name,
        token_limit=facts.images.captions.limit,
        images=[_sheet_image(facts, dataset, index) for index in range(len(scan.records))],
        held_out=len(scan.held_out),
        problems=[*(f"{path}: {why}" for path, why in scan.bad_images), *facts.images.notes, *scan.notes],
        facts=[(title, "; ".join(lines)) for title, lines in sections.items() if title in SHOWN_SECTIONS],
    )
    path = folder / "dataset.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_page(path, page, progress=True)
    except (OSError, CheckpointError) as error:
        raise UserError((Mistake(f"--debug_dataset: {error}", "use another --output_dir"),)) from error
    print(f"dataset page: {path.absolute()}")
    if sys.stdout.isatty() and _has_screen():
        webbrowser.open(path.absolute().as_uri())
    return path


def _has_screen() -> bool:
    """Whether a graphical browser can open. Without a display, webbrowser may start a text browser, which blocks."""
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _mask(reader: ImageReader, index: int, exact: Geometry, settings: MaskSettings) -> Mask:
    """(h, w) uint8: the loss weight of each pixel, 255 = 1, after --mask_invert and --mask_floor."""
    mask = reader.mask(index, exact)
    if mask is None:
        raise ValueError("this image has no mask")
    weights = 255 - mask if settings.invert else mask
    return np.maximum(weights, np.uint8(round(255 * settings.floor)))


def _sheet_image(facts: RunFacts, dataset: TrainingDataset, index: int) -> SheetImage:
    reader = dataset.images
    record, placement = reader.records[index], reader.placements[index]
    subset = reader.subsets[record.subset]
    exact = reader.geometry(index)
    masked = record.mask is not None or (subset.alpha_mask and record.transparent)
    texts = (
        dataset.caption(epoch, (epoch - 1) * facts.order.steps_per_epoch, index, 0) for epoch in range(1, EPOCHS + 1)
    )
    return SheetImage(
        path=str(record.path),
        subset=subset.source,
        is_reg=record.is_reg,
        bucket=placement.bucket,
        size=record.size,
        resized=exact.resized,
        pixels=partial(reader.pixels, index, exact),
        mask=partial(_mask, reader, index, exact, MaskSettings.from_options(facts.options.mask)) if masked else None,
        captions=tuple(SheetCaption(text, facts.base_model.tokenizer.count(text)) for text in texts),
        repeats=record.repeats,
        weight=facts.options.objective.prior_loss_weight if record.is_reg else 1.0,
        offset=exact.offset,
        score=record.score,
    )
