"""EMA copies of the U-Net's weights in checkpoints.

Names are those of ldm/modules/ema.py in CompVis/stable-diffusion: `model_ema.` and the weight's name without dots; two
further numbers, decay and num_updates.
"""

from __future__ import annotations

from dataclasses import replace

from library.checkpoints.header import CheckpointError, Header

PREFIX = "model_ema."
NUMBERS = (f"{PREFIX}decay", f"{PREFIX}num_updates")
_OF = "model."  # copies are of model.diffusion_model.*, named from diffusion_model on
_UNET = "model.diffusion_model."


def copies(header: Header) -> dict[str, str]:
    """Map U-Net weights to their EMA copies. Raises CheckpointError if two weights share a copy."""
    found: dict[str, str] = {}
    owners: dict[str, str] = {}
    for name in header.tensors:
        copy = PREFIX + name.removeprefix(_OF).replace(".", "")
        if not name.startswith(_UNET) or copy not in header.tensors:
            continue
        if copy in owners:
            raise CheckpointError(
                f"{header.path}: {copy} may be the EMA copy of {owners[copy]} or of {name}. Use --ema drop."
            )
        owners[copy] = name
        found[name] = copy
    return found


def names(header: Header) -> list[str]:
    """Return all names that start with `model_ema.`, including the two numbers."""
    return [name for name in header.tensors if name.startswith(PREFIX)]


def with_averages(header: Header) -> Header:
    """Return the checkpoint with the EMA copies as weights.

    Raises CheckpointError if there are none, not one for every weight, or one with another shape.
    """
    found = copies(header)
    weights = [name for name, info in header.tensors.items() if name.startswith(_UNET) and info.is_float]
    if not found:
        raise CheckpointError(f"{header.path}: contains no EMA copies (no key starts with {PREFIX}). Use --ema drop.")
    missing = [name for name in weights if name not in found]
    if missing:
        raise CheckpointError(
            f"{header.path}: has EMA copies of only {len(found)} of its U-Net's {len(weights)} tensors (none of "
            f"{missing[0]}). Use --ema drop."
        )
    tensors = {name: info for name, info in header.tensors.items() if not name.startswith(PREFIX)}
    places = {name: place for name, place in header.places.items() if not name.startswith(PREFIX)}
    for name, copy in found.items():
        if header.tensors[copy].shape != header.tensors[name].shape:
            raise CheckpointError(
                f"{header.path}: {copy} has the shape {header.tensors[copy].shape}, but its weight "
                f"{header.tensors[name].shape}. The file is damaged: use --ema drop."
            )
        tensors[name], places[name] = header.tensors[copy], header.places[copy]
    scaled = {name: stored for name, stored in header.scaled.items() if name in tensors and name not in found}
    return replace(header, tensors=tensors, places=places, scaled=scaled)
