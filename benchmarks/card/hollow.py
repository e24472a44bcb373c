"""Checkpoints of full size that take no space: the header of a safetensors file, and a hole where the values would be.

The plan needs names and shapes only, and a run reads zeros, which `random_weights` replaces on the device. So a model
of 7 GB is there at once, on any disk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from library.checkpoints.lazy import LazyTensor

MODELS = ("sd15", "sdxl", "tiny-sd1", "tiny-sdxl")
"""The models that `write_model` knows: full size, and the tests' miniatures."""


def write_model(path: Path, model: str) -> Path:
    """Write a hollow checkpoint of one of MODELS. Returns the path."""
    write_hollow(path, _tensors(model))
    return path


def write_hollow(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write a safetensors file whose tensors are all zero, as a hole in the file where the disk knows them."""
    from library.checkpoints.writer import header_bytes, in_file_order

    ordered = in_file_order(tensors)
    header = header_bytes(ordered, None)
    with path.open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + sum(tensor.info.nbytes for tensor in ordered.values()))


def _tensors(model: str) -> Mapping[str, LazyTensor]:
    """The tensors of one of MODELS, of which only names, shapes and formats are used."""
    if model == "sd15":
        from benchmarks import full_size

        return full_size.original_tensors()
    if model == "sdxl":
        from benchmarks import full_size_xl

        return full_size_xl.original_tensors("sdxl")
    from library.checkpoints.lazy import LazyTensor
    from tests import tiny

    family = model.removeprefix("tiny-")
    return {name: LazyTensor.of(tensor.half()) for name, tensor in tiny.original_state_dict(family).items()}


def random_weights(module: Any) -> None:
    """Replace a module's weights by random ones, on the device where they are: matrices and kernels keep the variance
    of what they are multiplied with, scales of norms are near one. Packed weights get random bits and small scales."""
    import torch

    from library.runtime.packed_weight import PackedWeight

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            mean, deviation = _spread(name, tuple(parameter.shape))
            if isinstance(parameter.data, PackedWeight):
                for _, piece in parameter.data.packed.pieces:  # type: ignore[attr-defined]
                    _fill_packed(piece, deviation)
            elif parameter.device.type == "cpu":
                _fill_from_pool(parameter, mean, deviation)
            else:
                parameter.normal_(mean, deviation)


@cache
def _pool() -> torch.Tensor:
    """Four million normal values: drawing those of a large model takes half a minute, copying them seconds."""
    import torch

    return torch.randn(2**22 + 1)  # not a multiple of any row


def _fill_from_pool(parameter: torch.Tensor, mean: float, deviation: float) -> None:
    """Fill a weight with values of the pool, again and again."""
    flat, pool = parameter.view(-1), _pool()
    for start in range(0, len(flat), len(pool)):
        part = flat[start : start + len(pool)]
        part.copy_(pool[: len(part)]).mul_(deviation).add_(mean)


def _spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a weight's values: as in full_size_xl.random_tensor."""
    if len(shape) > 1 and "embedding" not in name:
        return 0.0, 1 / math.sqrt(math.prod(shape[1:]))
    if len(shape) == 1 and name.endswith(".weight"):
        return 1.0, 0.1
    return 0.0, 0.02


def _fill_packed(piece: Any, deviation: float) -> None:
    """Random codes for some rows of a packed weight, and scales that give it this standard deviation (for the formats
    of library/training/quantised/backends.py: 8 bits, groups of fewer bits, 4 bits of bitsandbytes)."""
    import torch

    data = piece.data
    if data.is_floating_point():  # float8
        data.copy_(torch.randn(data.shape, device=data.device))
        piece.scale.fill_(deviation)
        return
    data.view(torch.uint8).random_(0, 256)
    if hasattr(piece, "state"):
        piece.state.absmax.fill_(deviation / 0.6)  # about the standard deviation of the 16 values of nf4
        return
    levels = 2 ** getattr(piece, "bits", 8)
    scale = deviation * math.sqrt(12) / levels  # of a uniform distribution
    piece.scale.fill_(scale)
    if hasattr(piece, "shift"):
        piece.shift.fill_(scale * (levels - 1) / 2)
