"""What stands in a model file, without its weights: names, shapes, dtypes. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

# Bytes of an element, by the dtype names of the safetensors format. The order is the one in which the safetensors
# library lays tensors out in a file, last first (widest first).
ITEM_SIZES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "C64": 8, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
FLOATS = frozenset({"F16", "BF16", "F32", "F64", "F8_E5M2", "F8_E4M3"})


class CheckpointError(ValueError):
    """A model file that cannot be used or written. The message is for the user: file, what is wrong, what to do."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype ("F32", "F16", "BF16", "I64", ... as in safetensors) of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.count * ITEM_SIZES[self.dtype]

    @property
    def is_float(self) -> bool:
        """Whether a save precision applies to it."""
        return self.dtype in FLOATS


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its file, its name there, and for safetensors the byte at which it starts."""

    file: Path
    name: str
    start: int | None = None


@dataclass(frozen=True)
class Header:
    """Everything known about a checkpoint before a weight is read.

    tensors   name -> TensorInfo. Levels that wrap the whole file (`state_dict.`, a leading `model.`) are taken off;
              those of a diffusers folder are `unet/...`, `vae/...`, `text_encoder/...`, `text_encoder_2/...`
    metadata  the strings of a safetensors header; of a .ckpt its plain numbers, such as epoch and global_step
    configs   of a diffusers folder: "model_index", "unet", ... -> the content of the JSON file
    places    name -> Place, for the reader
    """

    path: Path
    kind: Literal["safetensors", "ckpt", "diffusers"]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    places: Mapping[str, Place] = field(default_factory=dict)


# Keys of a Stable Diffusion file begin with one of these. A file in which they only appear behind another level was
# saved from a wrapper module (`model.model.diffusion_model. ...`) or from a dict flattened one level too many.
_ROOTS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")
_WRAPPERS = ("state_dict.", "model.", "module.")


def outer_level(names: Mapping[str, object]) -> str:
    """The prefix that wraps the known top-level keys of a file: "" in a usual file, else for instance "model."."""
    level = ""
    while not any(name.startswith(level + root) for name in names for root in _ROOTS):
        wrapper = next((w for w in _WRAPPERS if any(name.startswith(level + w) for name in names)), None)
        if wrapper is None:
            return ""
        level += wrapper
    return level


def without_outer_level(header: Header) -> Header:
    """The same header with the wrapping level taken off; keys that do not carry it (EMA counters) stay as they are."""
    level = outer_level(header.tensors)
    if not level:
        return header
    tensors = {name.removeprefix(level): info for name, info in header.tensors.items()}
    places = {name.removeprefix(level): place for name, place in header.places.items()}
    return Header(header.path, header.kind, tensors, header.metadata, header.configs, places)
