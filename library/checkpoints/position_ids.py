"""CLIP's position ids in checkpoints: 0, 1, 2, ... as int64. They are no weights, but WebUIs use those of the file: old
merging tools left them in fp16 or with wrong entries, so that words of prompts are lost. No torch at module level."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from library.checkpoints.header import Header, TensorInfo
from library.checkpoints.lazy import LazyTensor

if TYPE_CHECKING:
    from torch import Tensor


def is_position_ids(name: str) -> bool:
    """Whether a tensor of a checkpoint is a text encoder's position ids."""
    return name.rpartition(".")[2] == "position_ids"


def mended(name: str, tensor: LazyTensor) -> LazyTensor:
    """Return right position ids in the place of a file's; other tensors are returned unchanged."""
    if not is_position_ids(name):
        return tensor

    def load() -> Tensor:
        import torch

        return torch.arange(tensor.info.count).reshape(tensor.shape)

    return LazyTensor(TensorInfo("I64", tensor.shape), load)


def faults(header: Header) -> Iterator[str]:
    """Yield a line for each wrong position ids: another dtype, or, in a .safetensors, a wrong entry."""
    for name, info in header.tensors.items():
        if not is_position_ids(name) or header.kind == "diffusers":
            continue
        if info.dtype != "I64":
            yield f"{name} is {info.dtype} instead of I64"
        elif wrong := [str(index) for index, entry in enumerate(_entries(header, name)) if index != entry]:
            yield f"{name} is wrong at {', '.join(wrong[:5])}"


def _entries(header: Header, name: str) -> list[int]:
    """Return the values of an int64 tensor of a .safetensors; [] of a .ckpt."""
    place, info = header.places.get(name), header.tensors[name]
    if place is None or place.start is None:
        return []
    with place.file.open("rb") as stream:
        stream.seek(place.start)
        raw = stream.read(info.nbytes)
    return [int.from_bytes(raw[start : start + 8], "little", signed=True) for start in range(0, len(raw), 8)]
