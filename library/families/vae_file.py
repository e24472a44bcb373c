"""A VAE from a file or folder of its own (--vae). No torch at module level."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from library.checkpoints import keymap, sd_layout
from library.checkpoints.files import TensorReader, read_part_header
from library.checkpoints.header import CheckpointError
from library.checkpoints.lazy import LazyTensor

_PREFIX = sd_layout.VAE.prefix
_TRAINING = r"loss\..*|model_ema\..*"  # what VAE training leaves in its files


def vae_tensors(path: Path | str) -> dict[str, LazyTensor]:
    """A VAE's tensors under diffusers' names; nothing is read before it is asked for.

    `path`: a diffusers VAE folder, a whole diffusers folder (its vae/), or a file with original or diffusers names,
    with or without `first_stage_model.`; a whole model's file gives its VAE. Raises CheckpointError.
    """
    path = Path(path)
    if path.is_dir() and (path / "vae").is_dir():
        path = path / "vae"
    reader = TensorReader(read_part_header(path))
    tensors = {name: LazyTensor(info, partial(reader.get, name)) for name, info in reader.header.tensors.items()}
    if any(name.startswith(_PREFIX) for name in tensors):
        tensors = {name.removeprefix(_PREFIX): item for name, item in tensors.items() if name.startswith(_PREFIX)}
    tensors = {name: item for name, item in tensors.items() if not re.fullmatch(_TRAINING, name)}
    where = f"{path}: vae"
    if any(name.startswith("encoder.down.") for name in tensors):
        return keymap.to_diffusers(tensors, sd_layout.VAE.rules(tensors, "original"), where)
    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        return sd_layout.diffusers_names(tensors, sd_layout.VAE, where)
    raise CheckpointError(
        f"{path}: holds no VAE (no key begins with encoder.down). Give a VAE file or leave --vae out."
    )
