"""A VAE of its own (`--vae`): every form in which Stable Diffusion VAEs are published, as diffusers names it.

Forms: a file with original names, bare or behind `first_stage_model.` (a whole model serves too); a file with diffusers
names, today's or those of before 0.15; a folder with config.json and weights; a diffusers model folder, of which vae/
is taken.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from library.checkpoints import keymap
from library.checkpoints.files import TensorReader, read_part_header
from library.checkpoints.header import CheckpointError
from library.checkpoints.lazy import LazyTensor
from library.checkpoints.sd_layout import VAE, diffusers_names

_MODULES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


@dataclass(frozen=True)
class VaeFile:
    """A VAE by diffusers names; `notes` for the user; `original`: it stood in the original layout."""

    tensors: dict[str, LazyTensor]
    notes: tuple[str, ...]
    original: bool


def read_vae(path: Path | str) -> VaeFile:
    """Names and shapes of a VAE, its tensors lazy. Raises CheckpointError if it is none or has keys without a rule."""
    path = Path(path)
    folder = path / "vae" if (path / "vae").is_dir() else path
    header = read_part_header(folder)
    reader = TensorReader(header)
    lazy = {name: reader.lazy(name) for name in header.tensors}
    if any(name.startswith(VAE.prefix) for name in lazy):
        # of a whole model the rest is simply not asked for; only what lies under the prefix matters
        lazy = {name.removeprefix(VAE.prefix): tensor for name, tensor in lazy.items() if name.startswith(VAE.prefix)}
    modules = {name: tensor for name, tensor in lazy.items() if name.startswith(_MODULES)}
    if not modules:
        raise CheckpointError(
            f"{path}: holds no VAE (no key begins with encoder. or decoder.). Give a VAE file or folder."
        )
    others = [name for name in lazy if name not in modules]
    notes = (
        (f"{path}: {len(others)} tensors that are not of the VAE are left out ({others[0]}, ...)",) if others else ()
    )
    original = any(re.match(r"(?:encoder|decoder)\.(?:mid|down|up)\.", name) for name in modules)
    if original:
        return VaeFile(keymap.to_diffusers(modules, VAE.rules(modules, "original"), str(path)), notes, original=True)
    return VaeFile(diffusers_names(modules, VAE, str(path)), notes, original=False)
