"""Read a separate VAE (`--vae`) in any published form of Stable Diffusion VAEs, with diffusers' names.

Forms: a file with original names, with or without `first_stage_model.` (also of a whole model); a file with diffusers
names, current or from before 0.15; a folder with config.json and weights; a diffusers model folder with vae/.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from library.checkpoints import keymap
from library.checkpoints.files import TensorReader, read_part_header
from library.checkpoints.header import CheckpointError, Header
from library.checkpoints.lazy import LazyTensor
from library.checkpoints.quantized import refuse as refuse_quantized
from library.checkpoints.sd_layout import VAE, diffusers_names
from library.messages import counted

_MODULES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


@dataclass(frozen=True)
class VaeFile:
    """A VAE with diffusers' names; `notes` for the user; `original`: the file has the original layout. `header`: of the
    whole file, or of the folder with its config.json."""

    tensors: dict[str, LazyTensor]
    notes: tuple[str, ...]
    original: bool
    header: Header


def read_vae(path: Path | str) -> VaeFile:
    """Read a VAE with lazy tensors. Raises CheckpointError if it is not a VAE or has keys without a rule."""
    path = Path(path)
    folder = path / "vae" if (path / "vae").is_dir() else path
    header = read_part_header(folder)
    refuse_quantized(header)
    reader = TensorReader(header)
    lazy = {name: reader.lazy(name) for name in header.tensors}
    if any(name.startswith(VAE.prefix) for name in lazy):
        # the rest of a whole model is ignored
        lazy = {name.removeprefix(VAE.prefix): tensor for name, tensor in lazy.items() if name.startswith(VAE.prefix)}
    modules = {name: tensor for name, tensor in lazy.items() if name.startswith(_MODULES)}
    if not modules:
        raise CheckpointError(
            f"{path}: contains no VAE (no key starts with encoder. or decoder.). Give a VAE file or folder."
        )
    others = [name for name in lazy if name not in modules]
    notes = (f"{path}: left out {counted(len(others), 'tensor')} outside the VAE ({others[0]}, ...)",) if others else ()
    original = any(re.match(r"(?:encoder|decoder)\.(?:mid|down|up)\.", name) for name in modules)
    if original:
        modules = {VAE.original(name): tensor for name, tensor in modules.items()}
        renamed = keymap.to_diffusers(modules, VAE.rules(modules, "original"), str(path))
        return VaeFile(renamed, notes, original=True, header=header)
    return VaeFile(diffusers_names(modules, VAE, str(path)), notes, original=False, header=header)
