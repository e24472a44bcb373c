"""Miniature models for the tests of the tools that convert them, and their tensors as other programs read them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
UNET = "model.diffusion_model."


def read(path: Path) -> Tensors:
    """The tensors of a file by torch or by the safetensors library, or of all files of a folder, by their paths."""
    if path.is_dir():
        files = sorted([*path.rglob("*.safetensors"), *path.rglob("*.bin")])
        found = {file.relative_to(path).parent.as_posix(): read(file) for file in files}
        return {f"{folder}/{name}": tensor for folder, tensors in found.items() for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        return load_file(path)
    content: dict[str, Tensors] = torch.load(path, weights_only=True)
    return content.get("state_dict", content)  # type: ignore[arg-type, return-value]


def same(one: Tensors, other: Tensors) -> bool:
    """Whether both have the same names, dtypes, shapes and bits."""
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and tensor.shape == other[name].shape and torch.equal(tensor, other[name])
        for name, tensor in one.items()
    )


def with_averages(path: Path, made: Path) -> tuple[Path, Tensors]:
    """A copy of a file with an EMA copy of all of its U-Net, and the copies by the names of the weights.

    Names are made as ldm/modules/ema.py of CompVis/stable-diffusion makes them: the path in the module without dots.
    """
    tensors = read(path)
    averages = {name: tensor * 0.5 for name, tensor in tensors.items() if name.startswith(UNET)}
    for name, tensor in averages.items():
        tensors["model_ema." + name.removeprefix("model.").replace(".", "")] = tensor
    tensors |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(12, dtype=torch.int32)}
    save_file(tensors, made)
    return made, averages
