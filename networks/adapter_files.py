"""Read and write adapter files: .safetensors with metadata, or torch's .pt and .ckpt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.adapter_hashes import adapter_hashes
from library.checkpoints.files import TensorReader, read_header
from library.checkpoints.writer import check_finite, replacing, write_safetensors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AdapterFile:
    """The contents of an adapter file: tensors by key, on the CPU and independent of the file, and its metadata.
    `notes`: what the user should know of how another program's file was read (networks/formats/layer_names.py)."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read(path: Path | str) -> AdapterFile:
    """Read an adapter file; the content decides the format, not the name. CheckpointError: no such file, damaged, a
    pickle that would run code."""
    header = read_header(path)
    reader = TensorReader(header)
    # copies: Windows cannot overwrite a file that is mapped
    tensors = {name: reader.get(name).clone() for name in reader.names()}
    reader.close()
    return AdapterFile(tensors, dict(header.metadata))


def write(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write an adapter file, in the format of its extension. A .safetensors file also gets the hashes sshs_model_hash
    and sshs_legacy_hash; the others hold only the tensors. CheckpointError, keeping an existing file: a value that is
    not finite, a full disk."""
    path = Path(path)
    if path.suffix == ".safetensors":
        write_safetensors(path, tensors, {**(metadata or {}), **adapter_hashes(tensors, metadata or {})})
        return
    import torch

    whole = {name: tensor.detach().to("cpu").clone().contiguous() for name, tensor in tensors.items()}
    for name, tensor in whole.items():
        check_finite(path, name, tensor)
    with replacing(path) as stream:
        torch.save(whole, stream)
