"""The model of a run, read and looked over before anything is computed with it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import torch

from library.families.family import Model, TextSettings
from library.options.mistakes import Mistake, UserError
from library.runtime.half_weights import compute_in_full
from library.runtime.precision import FloatName, torch_dtype
from library.training.memory import loading_device
from library.training.saving.model_file import clip_skip_of, refuse_broken_weights

if TYPE_CHECKING:
    from library.checkpoints.header import Header
    from library.training.plan.facts import RunFacts


def load_model(
    facts: RunFacts,
    device: torch.device,
    say: Callable[[str], None],
    *,
    only: Collection[str] | None = None,
    base: FloatName = "fp32",
) -> Model:
    """All weights in float32, or those of the parts in `only`, read to `device` or to main memory; what the checkpoint
    held besides is said.

    `base` in half precision: the matrices of U-Net and text encoders lie in that format, and are computed with in
    float32. Raises UserError for weights that are not finite, and for a --clip_skip that the text encoder has no
    layers for.
    """
    base_model, options = facts.base_model, facts.options.model
    model = base_model.family.load(
        base_model.header,
        vae=base_model.vae,
        dtype=torch.float32,
        matrix_dtype=None if base == "fp32" else torch_dtype(base),
        device=loading_device(facts.options.memory, device),
        prediction=base_model.prediction,
        tokenizer_cache_dir=options.tokenizer_cache_dir,
        only=only,
        mapped=not options.disable_mmap_load_safetensors,
    )
    model.zero_terminal_snr = base_model.objective.zero_terminal_snr
    for note in model.notes:
        say(note)
    for name, module in model.modules().items():
        if name != "vae" and base != "fp32":
            compute_in_full(module)
    refuse_broken_weights(model)
    texts = [module for module in model.text_encoders.values() if module is not None]
    if len(texts) == len(model.text_encoders) and (options.clip_skip or 1) > 1:
        refuse_clip_skip(model, text_settings(facts), texts[0].device)
    return model


def text_settings(facts: RunFacts) -> TextSettings:
    """How the captions of a run are read. A --clip_skip that asks the family for nothing is none."""
    options = facts.options
    return TextSettings(
        clip_skip=clip_skip_of(options, facts.base_model),
        kohya_projection=options.model.text_projection == "kohya" and has_bare_projection(facts.base_model.header),
        empty_is_zero=options.caption.empty_caption == "zeros",
    )


def has_bare_projection(source: Header) -> bool:
    """Whether a checkpoint has the text projection as OpenCLIP's bare matrix, which sd-scripts takes for the weight of
    a Linear; folders and some files have that weight itself, and sd-scripts reads those rightly."""
    return any(name.endswith(".text_projection") for name in source.tensors)


def refuse_clip_skip(model: Model, settings: TextSettings, device: torch.device) -> None:
    """Raise UserError for a --clip_skip beyond the layers of the model's text encoder."""
    empty = {name: one.to(device) for name, one in model.tokenizer([""]).items()}
    try:
        with torch.no_grad():
            model.family.encode_text(model.text_encoders, empty, settings)
    except ValueError as error:
        raise UserError((Mistake(f"--clip_skip: {error}", "give a smaller one, or leave it out"),)) from error
