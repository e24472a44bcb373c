"""Writes a model: weights, metadata, and the .yaml file that WebUIs read."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.header import CheckpointError
from library.checkpoints.metadata import build_modelspec
from library.families.registry import write_inference_yaml
from library.messages import listed
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
    from library.training.trainable import SavedAt


def write_model(
    facts: RunFacts, model: Model, say: Callable[[str], None], path: Path, save_as: SaveModelAs, at: SavedAt
) -> None:
    """Write the model, completely or not at all. Raises CheckpointError, OSError."""
    if save_as == "pt":
        raise ValueError("only adapters are saved as pt")
    refuse_quantised(model, path)
    saving = facts.options.saving
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = model.family.save(
        model,
        path,
        save_as=save_as,
        dtype=torch_dtype(saving.save_precision) if saving.save_precision else None,
        metadata={**file_metadata(facts.options, facts.base_model, largest_resolution(facts.images)), **at.about},
        steps=at.step,
        epoch=at.epoch,
    )
    for note in notes:
        say(note)
    if saving.write_inference_yaml and not save_as.startswith("diffusers"):
        write_inference_yaml(model, path)


def refuse_quantised(model: Model, path: Path) -> None:
    """Raise CheckpointError for a model with quantised weights: its file would hold rounded weights as if they were
    the model's own."""
    from library.runtime.packed_weight import PackedWeight

    if any(isinstance(one, PackedWeight) for module in model.modules().values() for one in module.parameters()):
        raise CheckpointError(f"{path}: a quantised model cannot be saved; save its adapter, or load the model in full")


def file_metadata(options: TrainOptions, base_model: BaseModel, resolution: Size | None = None) -> dict[str, str]:
    """Metadata of a saved model: modelspec.* and the user's comment. `resolution`: (width, height) of the training.

    Raises CheckpointError for a --metadata_thumbnail that cannot be read.
    """
    metadata = modelspec(options, base_model, resolution)
    if options.saving.training_comment:
        metadata["ss_training_comment"] = options.saving.training_comment
    return metadata


def modelspec(
    options: TrainOptions, base_model: BaseModel, resolution: Size | None = None, **others: Any
) -> dict[str, str]:
    """modelspec.* of a saved file; SOURCE_DATE_EPOCH fixes its date, so that equal runs give equal files.

    `others`: further arguments of build_modelspec, for adapters. Raises CheckpointError for a
    --metadata_thumbnail that cannot be read.
    """
    given = {
        name.removeprefix("metadata_"): value
        for name, value in vars(options.saving).items()
        if name.startswith("metadata_") and name != "metadata_title" and value is not None
    }
    low, high = base_model.objective.min_timestep, base_model.objective.max_timestep
    timesteps = base_model.family.process.timesteps
    facts: dict[str, Any] = {
        "architecture": base_model.family.architectures[base_model.prediction],
        "title": options.saving.metadata_title or options.saving.output_name,
        "made_at": time_of_saving(),
        "resolution": resolution or options.dataset.resolution or base_model.family.preview[base_model.prediction],
        "prediction": base_model.prediction,
        "timestep_range": None if low is None and high is None else (low or 0, high or timesteps),
        "encoder_layer": clip_skip_of(options, base_model),
        "user_fields": given,
    }
    return build_modelspec(**facts | others)


def clip_skip_of(options: TrainOptions, base_model: BaseModel) -> int | None:
    """--clip_skip, for families that support it; else None."""
    return options.model.clip_skip if "clip_skip" in base_model.family.capabilities else None


def check_metadata(options: TrainOptions, base_model: BaseModel, mistakes: Mistakes) -> None:
    """Build the metadata once before training, so that a missing thumbnail does not cost the trained model."""
    try:
        file_metadata(options, base_model)
    except CheckpointError as error:
        mistakes.add(f"--{error}")


def time_of_saving() -> datetime:
    """The current time, or that of SOURCE_DATE_EPOCH (reproducible-builds.org)."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(fixed)) if fixed.isdigit() else datetime.now()


def check_finite_weights(model: Model) -> None:
    """Refuse a model with NaN or infinite values before the first step, as it could never be saved.

    Raises UserError with the names of the tensors.
    """
    broken = model.broken
    if not broken:
        return
    remedy = "download the model again, or use another one"
    if all(name.startswith("vae.") for name in broken):
        remedy = "use another VAE with --vae"
    what = f"{model.source.path}: the model contains NaN or infinite values ({listed(broken)})"
    raise UserError((Mistake(what, remedy),))
