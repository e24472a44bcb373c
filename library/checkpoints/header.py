"""Headers of model files: names, shapes and dtypes of tensors, without weights. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from library.checkpoints.quantized import Scaled

# Bytes per element, by dtype name of the safetensors format. The reverse of this order is the order of tensors in
# files of the safetensors library (widest first).
ITEM_SIZES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "C64": 8, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
FLOATS = frozenset({"F16", "BF16", "F32", "F64", "F8_E5M2", "F8_E4M3"})


class CheckpointError(ValueError):
    """A model file cannot be used or written. The message is for the user: file, what is wrong, what to do."""


class NotFiniteError(CheckpointError):
    """A file was not written because a tensor holds NaN or infinite values. Trying again is of no use."""


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
        """Whether it is a floating-point tensor, to which a save precision applies."""
        return self.dtype in FLOATS


@dataclass(frozen=True)
class Place:
    """Location of a tensor: file, name in the file, and for safetensors the offset of its first byte."""

    file: Path
    name: str
    start: int | None = None


@dataclass(frozen=True)
class Header:
    """Everything known about a checkpoint before a weight is read.

    tensors   name -> TensorInfo. Prefixes around all keys (`state_dict.`, a leading `model.`) are removed; names of a
              diffusers folder are `unet/...`, `vae/...`, `text_encoder/...`, `text_encoder_2/...`
    metadata  the strings of a safetensors header; of a .ckpt its plain numbers, such as epoch and global_step
    configs   of a diffusers folder: "model_index", "unet", ... -> content of the JSON file
    places    name -> Place, for the reader
    scaled    name -> Scaled, of weights that are multiplied by a scale when they are read (quantized.py)
    """

    path: Path
    kind: Literal["safetensors", "ckpt", "diffusers"]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    places: Mapping[str, Place] = field(default_factory=dict)
    scaled: Mapping[str, Scaled] = field(default_factory=dict)


# Keys of a Stable Diffusion file start with one of these. If they only occur after another prefix, the file was saved
# from a wrapper module (`model.model.diffusion_model. ...`) or from a dict flattened one level too far.
_ROOTS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")
_WRAPPERS = ("state_dict.", "model.", "module.")


def outer_level(names: Mapping[str, object]) -> str:
    """Return the extra prefix before the known keys of a file, such as "model."; "" for a usual file."""
    level = ""
    while not any(name.startswith(level + root) for name in names for root in _ROOTS):
        wrapper = next((w for w in _WRAPPERS if any(name.startswith(level + w) for name in names)), None)
        if wrapper is None:
            return ""
        level += wrapper
    return level


def without_outer_level(header: Header) -> Header:
    """Return the header with the extra prefix removed; keys without it (EMA counters) stay the same."""
    level = outer_level(header.tensors)
    if not level:
        return header
    tensors = {name.removeprefix(level): info for name, info in header.tensors.items()}
    places = {name.removeprefix(level): place for name, place in header.places.items()}
    return Header(header.path, header.kind, tensors, header.metadata, header.configs, places)
