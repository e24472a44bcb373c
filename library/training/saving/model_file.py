"""A saved model: weights, metadata, and what WebUIs want beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.header import CheckpointError
from library.checkpoints.metadata import build_modelspec
from library.families.registry import write_inference_yaml
from library.options.datasets import Size
from library.options.mistakes import Mistake, Mistakes, UserError
from library.runtime.precision import torch_dtype
from library.training.saving.dataset_metadata import largest_resolution

if TYPE_CHECKING:
    from library.families.family import Model
    from library.options.groups.saving import SaveModelAs
    from library.options.train_options import TrainOptions
    from library.training.plan.base_model import BaseModel
    from library.training.plan.facts import RunFacts


def write_model(
    facts: RunFacts, model: Model, say: Callable[[str], None], path: Path, save_as: SaveModelAs, step: int, epoch: int
) -> None:
    """Write the model as it is after `step` optimiser steps, whole or not at all. Raises CheckpointError, OSError."""
    if save_as == "pt":
        raise ValueError("only adapters are saved as pt")
    saving = facts.options.saving
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = model.family.save(
        model,
        path,
        save_as=save_as,
        dtype=torch_dtype(saving.save_precision) if saving.save_precision else None,
        metadata=file_metadata(facts.options, facts.base_model, largest_resolution(facts.images)),
        steps=step,
        epoch=epoch,
    )
    for note in notes:
        say(note)
    if saving.write_inference_yaml and not save_as.startswith("diffusers"):
        write_inference_yaml(model, path)


def file_metadata(options: TrainOptions, base_model: BaseModel, resolution: Size | None = None) -> dict[str, str]:
    """Metadata of a saved model: modelspec.* and the user's comment. `resolution`: what was trained at, where known.

    Raises CheckpointError for a --metadata_thumbnail that cannot be read.
    """
    found = modelspec(options, base_model, resolution)
    if options.saving.training_comment:
        found["ss_training_comment"] = options.saving.training_comment
    return found


def modelspec(
    options: TrainOptions, base_model: BaseModel, resolution: Size | None = None, **others: Any
) -> dict[str, str]:
    """modelspec.* of a saved file; SOURCE_DATE_EPOCH fixes its date, so that equal runs give equal files.

    `others`: arguments of build_modelspec for a file that is no whole model. Raises CheckpointError for a
    --metadata_thumbnail that cannot be read.
    """
    given = {
        name.removeprefix("metadata_"): value
        for name, value in vars(options.saving).items()
        if name.startswith("metadata_") and name != "metadata_title" and value is not None
    }
    least, end = base_model.objective.min_timestep, base_model.objective.max_timestep
    everything = base_model.family.process.timesteps
    facts: dict[str, Any] = {
        "architecture": base_model.family.architectures[base_model.prediction],
        "title": options.saving.metadata_title or options.saving.output_name,
        "made_at": time_of_saving(),
        "resolution": resolution or options.dataset.resolution or base_model.family.preview[base_model.prediction],
        "prediction": base_model.prediction,
        "timestep_range": None if least is None and end is None else (least or 0, end or everything),
        "encoder_layer": clip_skip_of(options, base_model),
        "user_fields": given,
    }
    return build_modelspec(**facts | others)


def clip_skip_of(options: TrainOptions, base_model: BaseModel) -> int | None:
    """--clip_skip, where the family has a choice of layers."""
    return options.model.clip_skip if "clip_skip" in base_model.family.capabilities else None


def check_metadata(options: TrainOptions, base_model: BaseModel, mistakes: Mistakes) -> None:
    """What a file says about itself is made once before training: a missing thumbnail must not cost the model."""
    try:
        file_metadata(options, base_model)
    except CheckpointError as error:
        mistakes.add(f"--{error}")


def time_of_saving() -> datetime:
    """Now, or the time that SOURCE_DATE_EPOCH (reproducible-builds.org) says."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(fixed)) if fixed.isdigit() else datetime.now()


def refuse_broken_weights(model: Model) -> None:
    """A model with NaN or infinite values could be trained, perhaps, but never saved: told before the first step.

    Raises UserError that names the tensors.
    """
    broken = model.broken
    if not broken:
        return
    named = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
    remedy = "get the model again or another one"
    if all(name.startswith("vae.") for name in broken):
        remedy = "give another VAE with --vae"
    what = f"{model.source.path}: the model holds NaN or infinite values ({named})"
    raise UserError((Mistake(what, remedy),))
