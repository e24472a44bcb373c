"""Training states of a sharded run: each process writes its own shards, by torch.distributed.checkpoint in the form of
safetensors (no pickles), and a run with any number of processes reads them, a single one too.

A state folder holds the files of any other state, with a mark in place of each sharded tensor, and the tensors in the
folder `shards`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from library.training.saving.state import RunState

FOLDER = "shards"
_MARK = "sharded"


@dataclass
class TakenApart:
    """The entries of a state: what is left of them, and the sharded tensors by name."""

    rest: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def take_apart(state: RunState) -> TakenApart:
    """Take the sharded tensors out of a state."""
    taken = TakenApart()
    for name, entry in state.items():
        if entry is not None:
            taken.rest[name] = _without_shards(name, entry.state_dict(), taken.tensors)
    return taken


def _without_shards(path: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    from torch.distributed.tensor import DTensor

    if isinstance(value, DTensor):
        tensors[path] = value.detach()
        return {_MARK: path, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {key: _without_shards(f"{path}/{key}", each, tensors) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_without_shards(f"{path}/{number}", each, tensors) for number, each in enumerate(value))
    return value


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the shards of this process. All processes must call this. Raises OSError on all if one fails."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise OSError(f"{type(first).__name__}: {first}") from None


def load_shards(folder: Path, state: RunState, mesh: Any | None) -> None:
    """Load the state of a sharded run into `state`: as shards over `mesh`, else (None) whole."""
    from library.checkpoints.pickles import check_pickle
    from library.training.saving.state import file_of

    for name, entry in state.items():
        if entry is not None:  # one after the other: what an optimizer loads becomes its state, without a second copy
            path = folder / file_of(name)
            check_pickle(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
            entry.load_state_dict(put_together(folder / FOLDER, content, mesh))


def put_together(folder: Path, content: Any, mesh: Any | None) -> Any:
    """The content of one of a state's files with its tensors: as shards over `mesh`, else (None) whole. Raises
    ValueError for tensors that are larger than the shards, before it allocates them."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    held = sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0
    if (needed := sum(_bytes_of_marks(content))) > held:
        raise ValueError(f"the shards hold {held} bytes, and {needed} are asked for")
    tensors: dict[str, Tensor] = {}
    whole = _with_tensors(content, tensors, mesh)
    if tensors:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant in a single process
            load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=mesh is None)
    return whole


def _bytes_of_marks(value: Any) -> Iterator[int]:
    if isinstance(value, Mapping) and _MARK in value:
        yield math.prod(value["shape"]) * getattr(torch, value["dtype"]).itemsize
    elif isinstance(value, (Mapping, list, tuple)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _bytes_of_marks(each)


def _with_tensors(value: Any, tensors: dict[str, Tensor], mesh: Any | None) -> Any:
    if isinstance(value, Mapping) and _MARK in value:
        shape, dtype = tuple(value["shape"]), getattr(torch, value["dtype"])
        if mesh is None:
            tensors[value[_MARK]] = torch.empty(shape, dtype=dtype)
        else:
            from torch.distributed.tensor import Shard, empty

            tensors[value[_MARK]] = empty(*shape, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
        return tensors[value[_MARK]]
    if isinstance(value, Mapping):
        return {key: _with_tensors(each, tensors, mesh) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_tensors(each, tensors, mesh) for each in value)
    return value
