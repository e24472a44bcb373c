"""Read and write adapter files: .safetensors with metadata, or torch's .pt and .ckpt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.adapter_hashes import adapter_hashes
from library.checkpoints.files import TensorReader, read_header
from library.checkpoints.header import CheckpointError
from library.checkpoints.loading import is_finite
from library.checkpoints.writer import check_finite, replacing, write_safetensors
from library.messages import counted, listed
from library.whole_files import remove_leftovers

if TYPE_CHECKING:
    from torch import Tensor


_FACTORS = (".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".lora_B.weight", ".lora_mid.weight")


@dataclass(frozen=True)
class AdapterFile:
    """The contents of an adapter file: tensors by key, on the CPU and independent of the file, and its metadata.
    `notes`: what the user should know of how another program's file was read (networks/formats/layer_names.py)."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read(path: Path | str, *, damaged: bool = False) -> AdapterFile:
    """Read an adapter file; the content decides the format, not the name. CheckpointError: no such file, damaged, a
    pickle that would run code, tensors that no adapter can have (see `faults`). `damaged`: also with such tensors."""
    header = read_header(path)
    reader = TensorReader(header)
    # copies: Windows cannot overwrite a file that is mapped
    tensors = {name: reader.get(name).clone() for name in reader.names()}
    reader.close()
    if not damaged and (found := faults(tensors)):
        raise CheckpointError(
            f"{path}: {counted(len(found), 'tensor')} cannot be used: {listed(found, 5)}. Get the file again, or train "
            "it again if its training diverged."
        )
    return AdapterFile(tensors, dict(header.metadata))


def faults(tensors: Mapping[str, Tensor]) -> list[str]:
    """Each tensor that no adapter can have, with the reason: NaN or infinite values, no values (rank 0), integers as
    weights, an alpha that is not one number, factors of a LoRA that are no matrices."""
    found = []
    for name, tensor in tensors.items():
        if not tensor.numel():
            found.append(f"{name} (no values, as of rank 0)")
        elif name.endswith(".alpha") and tensor.numel() != 1:
            found.append(f"{name} ({tensor.numel()} values instead of one)")
        elif tensor.is_complex() or (tensor.numel() > 1 and not tensor.is_floating_point()):
            found.append(f"{name} (stored as {str(tensor.dtype).removeprefix('torch.')})")
        elif tensor.is_floating_point() and not is_finite(tensor.float()):
            found.append(f"{name} (NaN or infinite values)")
        elif name.endswith(_FACTORS) and tensor.dim() < 2:
            found.append(f"{name} (not a matrix, but of shape {tuple(tensor.shape)})")
    return found


def write(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write an adapter file, in the format of its extension. A .safetensors file also gets the hashes sshs_model_hash
    and sshs_legacy_hash; the others hold only the tensors. CheckpointError, keeping an existing file: a value that is
    not finite, a full disk."""
    path = Path(path)
    remove_leftovers(path.parent, only=path.name)
    if path.suffix == ".safetensors":
        write_safetensors(path, tensors, {**(metadata or {}), **adapter_hashes(tensors, metadata or {})})
        return
    import torch

    whole = {name: tensor.detach().to("cpu").clone().contiguous() for name, tensor in tensors.items()}
    for name, tensor in whole.items():
        check_finite(path, name, tensor)
    with replacing(path) as stream:
        torch.save(whole, stream)
