"""Write model files atomically (library/whole_files.py): an existing file is kept until the new one is whole on disk.

Tensors are written one at a time, so that saving in another precision needs the memory of the largest tensor, not of a
second model. Layout: the safetensors format.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from library import whole_files
from library.checkpoints.header import FLOATS, ITEM_SIZES, CheckpointError, NotFiniteError
from library.checkpoints.lazy import LazyTensor, torch_dtype
from library.checkpoints.pickle_writer import write_torch

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
PIECE = 2**20  # bytes of a tensor copied at once; fits a processor's cache
SMALL = 2**16  # bytes below which handing a read to a thread takes longer than the read


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[BinaryIO]:
    """Like whole_files.replacing. Raises CheckpointError if the disk is full or the path is not writable."""
    path = Path(path)
    with _explained(path), whole_files.replacing(path) as stream:
        yield stream


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Like whole_files.replacing_folder. Raises CheckpointError if the disk is full or the path is not writable."""
    with _explained(path), whole_files.replacing_folder(path) as folder:
        try:
            yield folder
        except CheckpointError as error:  # of a file in the folder: name the one that the user knows
            raise type(error)(str(error).replace(str(folder), str(path))) from error


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn OSErrors about `path` into CheckpointErrors. Those about another file, such as the source of the tensors,
    stay as they are."""
    try:
        yield
    except OSError as error:
        name = None if error.filename is None else Path(os.fsdecode(error.filename))
        ours = name is None or name in (path, *path.parents) or any(map(whole_files.is_temporary, name.parts))
        if not ours:
            raise
        raise CheckpointError(_unwritten(path, error)) from error


def _unwritten(path: Path, error: OSError) -> str:
    remedy = "Check the path and its permissions."
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "Free some space or choose another output_dir."
    return f"{path}: could not be written ({error.strerror or error}). Nothing was changed. {remedy}"


def write_text(path: Path | str, text: str) -> None:
    """Write a text file (UTF-8, line ends unchanged) atomically. Raises CheckpointError."""
    with replacing(path) as stream:
        stream.write(text.encode("utf-8"))


def write_json(path: Path | str, value: Any) -> None:
    """Write a JSON file (indented, UTF-8) atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_safetensors(
    path: Path | str,
    tensors: Mapping[str, Tensor | LazyTensor],
    metadata: Mapping[str, str] | None = None,
    dtype: str | None = None,
    check: Callable[[], None] | None = None,
) -> None:
    """Write a .safetensors file; `dtype` ("F32", "F16", "BF16") casts the floating-point tensors.

    `check` is called before the file replaces an existing one. If it raises, nothing is changed. Raises
    CheckpointError, without changes, for a full disk, and NotFiniteError for NaN or infinite values (names the tensor).
    """
    ordered = in_file_order(tensors, dtype)
    with replacing(path) as stream:
        stream.write(header_bytes(ordered, metadata or None))
        for piece in prefetch(_pieces(Path(path), ordered)):
            stream.write(piece)
            del piece  # otherwise three pieces would be in memory
        if check is not None:
            check()


def prefetch(reads: Iterable[tuple[int, Callable[[], T]]]) -> Iterator[T]:
    """Yield the results of the calls, each given with its number of bytes, running the next one in a thread while the
    caller uses the last one: reading and checking takes as long as writing. Two results are in memory at a time."""
    with ThreadPoolExecutor(1) as thread:
        waiting = iter(reads)

        def begin_next() -> Callable[[], T] | None:
            size, read = next(waiting, (0, None))
            return read if read is None or size < SMALL else thread.submit(read).result

        result_of = begin_next()
        while result_of is not None:
            result = result_of()
            result_of = begin_next()
            yield result


def _pieces(path: Path, tensors: Mapping[str, LazyTensor]) -> Iterator[tuple[int, Callable[[], memoryview]]]:
    """Yield sizes, and functions that read and check so many bytes of tensors in order. Tensors with a place in a file
    are read in pieces into reused buffers, as new memory costs more than the copy."""
    buffers = itertools.cycle((bytearray(PIECE), bytearray(PIECE)))
    for name, lazy in tensors.items():
        size = lazy.info.nbytes
        if lazy.place is None:
            yield size, partial(_bytes_of, path, name, lazy)
            continue
        for start in range(0, size, PIECE):
            yield min(PIECE, size - start), partial(_piece, path, name, lazy, start, next(buffers))


def _bytes_of(path: Path, name: str, lazy: LazyTensor) -> memoryview:
    return raw_bytes(_checked(path, name, lazy))


def _piece(path: Path, name: str, lazy: LazyTensor, start: int, buffer: bytearray) -> memoryview:
    import torch

    place = lazy.place
    if place is None or place.start is None:
        raise ValueError(f"{name} is not in a file")
    piece = memoryview(buffer)[: min(PIECE, lazy.info.nbytes - start)]
    with place.file.open("rb", buffering=0) as source:
        source.seek(place.start + start)
        done = 0
        while done < len(piece):
            count = source.readinto(piece[done:])
            if not count:
                raise CheckpointError(f"{place.file}: the file became shorter while it was read. Get it again.")
            done += count
    if not lazy.may_be_infinite:
        check_finite(path, name, torch.frombuffer(piece, dtype=torch_dtype(lazy.dtype)))
    return piece


def in_file_order(tensors: Mapping[str, Tensor | LazyTensor], dtype: str | None = None) -> dict[str, LazyTensor]:
    """Return the tensors in the order of a .safetensors file: wide dtypes first, then by name; cast to `dtype` like
    `write_safetensors`."""
    lazy = {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}
    if dtype is not None:
        lazy = {name: tensor.cast(dtype) for name, tensor in lazy.items()}
    ranks = {name: rank for rank, name in enumerate(ITEM_SIZES)}
    order = sorted(lazy, key=lambda name: (-ranks[lazy[name].dtype], name.encode("utf-8")))
    return {name: lazy[name] for name in order}


def header_bytes(ordered: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None) -> bytes:
    """Return the header of a .safetensors file for tensors in file order. Metadata None and {} give different headers,
    as in the safetensors library."""
    table: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, lazy in ordered.items():
        info = lazy.info
        table[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [end, end + info.nbytes]}
        end += info.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _checked(path: Path, name: str, lazy: LazyTensor) -> Tensor:
    """Load the tensor, contiguous on the CPU, and check that it is as declared and finite."""
    tensor = lazy.load().detach().to("cpu").contiguous()
    if tuple(tensor.shape) != lazy.shape or LazyTensor.of(tensor).dtype != lazy.dtype:
        raise ValueError(f"{name}: declared as {lazy.info}, is {tensor.dtype} {tuple(tensor.shape)}")
    if not lazy.may_be_infinite:
        check_finite(path, name, tensor)
    return tensor


def check_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Raise NotFiniteError if a tensor to be written to `path` contains NaN or infinite values."""
    if LazyTensor.of(tensor).dtype not in FLOATS or not tensor.numel():
        return
    if tensor.element_size() == 1:
        tensor = tensor.float()
    low, high = tensor.aminmax()  # one pass, no copy; a NaN anywhere makes both NaN
    if not (low.isfinite() and high.isfinite()):
        raise NotFiniteError(
            f"{path}: not written, because {name} contains NaN or infinite values. Nothing was changed. "
            "Either training has diverged (lower the learning rate, use bf16 or fp32), "
            "or the values do not fit fp16 (save in bf16 or float)."
        )


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor as in a .safetensors file, without a copy."""
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_ckpt(
    path: Path | str,
    state_dict: Mapping[str, Tensor | LazyTensor],
    extra: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    check: Callable[[], None] | None = None,
) -> None:
    """Write a .ckpt: {"state_dict": ..., **extra}, as torch.save does, but tensor by tensor.

    `extra`: plain values such as epoch and global_step. Otherwise like write_safetensors.
    """
    _write_torch(path, state_dict, dtype, lambda tensors: {"state_dict": tensors, **(extra or {})}, check)


def write_bin(path: Path | str, state_dict: Mapping[str, Tensor | LazyTensor], dtype: str | None = None) -> None:
    """Write a .bin of a diffusers folder: the plain dict of tensors. Otherwise like write_ckpt."""
    _write_torch(path, state_dict, dtype, lambda tensors: tensors, None)


def _write_torch(
    path: Path | str,
    state_dict: Mapping[str, Tensor | LazyTensor],
    dtype: str | None,
    wrap: Callable[[dict[str, Any]], Any],
    check: Callable[[], None] | None,
) -> None:
    lazy = {name: LazyTensor.of(tensor) for name, tensor in state_dict.items()}
    if dtype is not None:
        lazy = {name: tensor.cast(dtype) for name, tensor in lazy.items()}
    with replacing(path) as stream:
        contents = prefetch(
            (tensor.info.nbytes, partial(_bytes_of, Path(path), name, tensor)) for name, tensor in lazy.items()
        )
        write_torch(stream, lazy, contents, wrap)
        if check is not None:
            check()
