"""The model of a run, read and looked over before anything is computed with it."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from library.families.family import Model
from library.options.mistakes import Mistake, UserError
from library.training.model_file import refuse_broken_weights
from library.training.run import LOGGER

if TYPE_CHECKING:
    from library.training.plan.caching import AnyPlan


def load_model(plan: AnyPlan, device: torch.device, only: Collection[str] | None = None) -> Model:
    """All weights in float32, or those of the parts in `only`; what the checkpoint held besides is logged.

    Raises UserError for weights that are not finite, and for a --clip_skip that the text encoder has no layers for.
    """
    source, options = plan.source, plan.options.model
    model = source.family.load(
        source.header,
        vae=source.vae,
        dtype=torch.float32,
        device=device,
        prediction=source.prediction,
        tokenizer_cache_dir=options.tokenizer_cache_dir,
        only=only,
    )
    for note in model.notes:
        LOGGER.info(note)
    refuse_broken_weights(model)
    if model.text_encoder is not None:
        refuse_clip_skip(model, options.clip_skip)
    return model


def refuse_clip_skip(model: Model, clip_skip: int | None) -> None:
    """Raise UserError for a --clip_skip beyond the layers of the model's text encoder."""
    empty = model.tokenizer.tensor([""]).to(model.text_encoder.device)
    try:
        with torch.no_grad():
            model.family.encode_text(model.text_encoder, empty, clip_skip)
    except ValueError as error:
        raise UserError((Mistake(f"--clip_skip: {error}", "give a smaller one, or leave it out"),)) from error
