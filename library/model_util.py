"""Names of sd-scripts that front-ends' own tools import from `library.model_util`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from library.families.family import Model


def is_safetensors(path: str | Path) -> bool:
    """Whether a path ends in .safetensors."""
    return Path(path).suffix.lower() == ".safetensors"


def load_models_from_stable_diffusion_checkpoint(
    v2: bool,  # noqa: FBT001 - as kohya_ss's extraction of LyCORIS calls it
    ckpt_path: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Text encoder, VAE and U-Net of a file, whose layers have the names of adapter files. `v2` is not needed."""
    modules, model = load_with_names_of_files(ckpt_path, device, dtype)
    return modules["text_encoder"], model.vae, modules["unet"]


def load_with_names_of_files(
    ckpt_path: str | Path, device: str, dtype: torch.dtype | None
) -> tuple[dict[str, nn.Module], Model]:
    """The modules that adapters apply to, in the module tree that network modules of sd-scripts expect, and the model.

    Both share the weights. Raises CheckpointError.
    """
    from library.checkpoints.files import read_header
    from library.families.registry import load_model
    from networks.third_party.stand_ins import stand_ins

    model = load_model(read_header(Path(ckpt_path)), device=device, dtype=dtype)
    return stand_ins(model.modules(), model.family.adapters).modules, model
