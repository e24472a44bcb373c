"""A saved model: weights, metadata, and what WebUIs want beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.metadata import build_modelspec
from library.families.registry import write_inference_yaml
from library.runtime.precision import torch_dtype

if TYPE_CHECKING:
    from library.families.family import Model
    from library.training.plan.plan import Plan


def write_model(plan: Plan, model: Model, say: Callable[[str], None], path: Path, step: int, epoch: int) -> None:
    """Write the model as it is after `step` optimiser steps, whole or not at all. Raises CheckpointError, OSError."""
    saving, family = plan.options.saving, plan.source.family
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = family.save(
        model,
        path,
        save_as=plan.outputs.save_as,
        dtype=torch_dtype(saving.save_precision) if saving.save_precision else None,
        metadata=file_metadata(plan),
        steps=step,
        epoch=epoch,
    )
    for note in notes:
        say(note)
    if saving.write_inference_yaml and plan.outputs.extension:
        write_inference_yaml(model, path)


def file_metadata(plan: Plan) -> dict[str, str]:
    """modelspec.* of a saved model; SOURCE_DATE_EPOCH fixes its date, so that equal runs give equal files."""
    options = plan.options
    given = {
        name.removeprefix("metadata_"): value
        for name, value in vars(options.saving).items()
        if name.startswith("metadata_") and name != "metadata_title" and value is not None
    }
    found = build_modelspec(
        architecture=plan.source.family.architectures[plan.source.prediction],
        title=options.saving.metadata_title or options.saving.output_name,
        made_at=time_of_saving(),
        resolution=options.dataset.resolution or plan.source.family.preview[plan.source.prediction],
        prediction=plan.source.prediction,
        encoder_layer=options.model.clip_skip,
        given=given,
    )
    if options.saving.training_comment:
        found["ss_training_comment"] = options.saving.training_comment
    return found


def time_of_saving() -> datetime:
    """Now, or the time that SOURCE_DATE_EPOCH (reproducible-builds.org) says."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(fixed)) if fixed.isdigit() else datetime.now()
