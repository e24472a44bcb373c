"""The moving average of the U-Net's weights that some checkpoints carry besides the weights.

Source of the names: ldm/modules/ema.py of CompVis/stable-diffusion: a copy is called as its weight without the dots,
behind `model_ema.`; there are two numbers more, decay and num_updates.
"""

from __future__ import annotations

from dataclasses import replace

from library.checkpoints.header import CheckpointError, Header

PREFIX = "model_ema."
NUMBERS = (f"{PREFIX}decay", f"{PREFIX}num_updates")
_OF = "model."  # copies are of model.diffusion_model.*, named from diffusion_model on
_UNET = "model.diffusion_model."


def copies(header: Header) -> dict[str, str]:
    """Weight of the U-Net -> its copy, of those that have one. Raises CheckpointError where two would share a copy."""
    found: dict[str, str] = {}
    owners: dict[str, str] = {}
    for name in header.tensors:
        copy = PREFIX + name.removeprefix(_OF).replace(".", "")
        if not name.startswith(_UNET) or copy not in header.tensors:
            continue
        if copy in owners:
            raise CheckpointError(
                f"{header.path}: {copy} may be the EMA copy of {owners[copy]} or of {name}. Convert without it."
            )
        owners[copy] = name
        found[name] = copy
    return found


def names(header: Header) -> list[str]:
    """All that begins with `model_ema.`, the two numbers included."""
    return [name for name in header.tensors if name.startswith(PREFIX)]


def with_averages(header: Header) -> Header:
    """The checkpoint with the averaged weights in place of the plain ones, and without the copies.

    Raises CheckpointError: none there, not for every weight, another shape.
    """
    found = copies(header)
    weights = [name for name, info in header.tensors.items() if name.startswith(_UNET) and info.is_float]
    if not found:
        raise CheckpointError(
            f"{header.path}: holds no EMA copies (no key begins with {PREFIX}). Convert without them."
        )
    missing = [name for name in weights if name not in found]
    if missing:
        raise CheckpointError(
            f"{header.path}: has EMA copies of {len(found)} of its U-Net's {len(weights)} tensors; a mixture of "
            f"both would be no model (there is none of {missing[0]}). Convert without them."
        )
    tensors = {name: info for name, info in header.tensors.items() if not name.startswith(PREFIX)}
    places = {name: place for name, place in header.places.items() if not name.startswith(PREFIX)}
    for name, copy in found.items():
        if header.tensors[copy].shape != header.tensors[name].shape:
            raise CheckpointError(
                f"{header.path}: {copy} has the shape {header.tensors[copy].shape}, and its weight has "
                f"{header.tensors[name].shape}. The file is damaged."
            )
        tensors[name], places[name] = header.tensors[copy], header.places[copy]
    return replace(header, tensors=tensors, places=places)
