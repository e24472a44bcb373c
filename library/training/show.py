"""--debug_dataset: a page that shows what a run would be trained on."""

from __future__ import annotations

import sys
import webbrowser
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.header import CheckpointError
from library.data.contact_sheet import Page, Shown, ShownCaption, write_page
from library.options.mistakes import Mistake, UserError
from library.training.inputs import picture_reader, training_set
from library.training.plan.text import sections

if TYPE_CHECKING:
    from library.data.dataset import TrainingDataset
    from library.training.plan.plan import Plan

EPOCHS = 3  # whose captions are shown


def show_dataset(plan: Plan) -> Path:
    """Write the page into --output_dir, say where it is, and open it where somebody sits before a screen. Raises
    UserError if it cannot be written."""
    dataset = training_set(plan, picture_reader(plan), None)
    found = plan.pictures.scan
    page = Page(
        title=plan.options.saving.output_name or plan.outputs.directory.name,
        token_limit=plan.pictures.captions.limit,
        shown=[_shown(plan, dataset, index) for index in range(len(found.records))],
        problems=[*(f"{path}: {why}" for path, why in found.bad_images), *plan.pictures.notes, *found.notes],
        facts=[(title, line) for title, lines in sections(plan) for line in lines],
    )
    path = plan.outputs.directory / "dataset.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_page(path, page, progress=True)
    except (OSError, CheckpointError) as error:
        raise UserError((Mistake(f"--debug_dataset: {error}", "give another --output_dir"),)) from error
    print(f"what the model would be given: {path.absolute()}")
    if sys.stdout.isatty():
        webbrowser.open(path.absolute().as_uri())
    return path


def _shown(plan: Plan, dataset: TrainingDataset, index: int) -> Shown:
    reader = dataset.pictures
    record, placement = reader.records[index], reader.placements[index]
    subset = reader.subsets[record.subset]
    exact = reader.geometry(index)
    masked = record.mask is not None or (subset.alpha_mask and record.transparent)
    texts = (
        dataset.caption(epoch, (epoch - 1) * plan.order.steps_per_epoch, index, 0) for epoch in range(1, EPOCHS + 1)
    )
    count = partial(plan.source.tokenizer.count, weighted=plan.options.caption.weighted_captions)
    return Shown(
        path=str(record.path),
        subset=str(subset.image_dir or subset.metadata_file),
        is_reg=record.is_reg,
        bucket=placement.bucket,
        size=record.size,
        resized=exact.resized,
        pixels=partial(reader.pixels, index, exact),
        mask=partial(reader.mask, index, exact) if masked else None,
        captions=tuple(ShownCaption(text, count(text)) for text in texts),
        repeats=record.repeats,
        weight=plan.options.objective.prior_loss_weight if record.is_reg else 1.0,
    )
