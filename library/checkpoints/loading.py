"""Read many tensors of a mapped file into memory of their own, fast.

torch shares each single copy among its threads, which all wait for the slowest, a thousand times a model. Here each
thread takes whole tensors, so that a busy processor holds up nobody else. The rest of the time is the system handing
out the memory. (Pages of 2 MiB by madvise halve that at best, and cost seconds on virtual machines that give free
memory back to the host. Who wants them sets torch's THP_MEM_ALLOC_ENABLE=1.)
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from library.checkpoints.lazy import LazyTensor, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_PIECE = 30_000  # elements: below 32768 torch copies in the calling thread (at::internal::GRAIN_SIZE)
_MOST_THREADS = 8  # memory bandwidth is used up before


def load_tensors(
    tensors: Mapping[str, LazyTensor], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """All tensors in memory of their own, so that the file may change afterwards, on `device`.

    Floating ones are converted to `dtype` (None: as they are). Peak memory is the result and nothing beside it.
    """
    import torch

    def load(name: str) -> Tensor:
        lazy = tensors[name]
        to = dtype if dtype is not None and lazy.info.is_float else torch_dtype(lazy.dtype)
        if torch.device(device).type != "cpu":
            return lazy.load().to(device).to(to)  # converted there: what crosses the bus is what the file holds
        return _copied(lazy.load(), torch.empty(lazy.shape, dtype=to))

    threads = min(torch.get_num_threads(), _MOST_THREADS) if torch.device(device).type == "cpu" else 1
    largest_first = sorted(tensors, key=lambda name: -tensors[name].info.count)
    with ThreadPoolExecutor(threads) as pool:
        loaded = dict(zip(largest_first, pool.map(load, largest_first), strict=True))
    return {name: loaded[name] for name in tensors}


def _copied(source: Tensor, target: Tensor) -> Tensor:
    """The target, holding the values of the source; converted by the calling thread alone."""
    if not source.is_contiguous():
        return target.copy_(source)
    flat, values = target.view(-1), source.view(-1)
    for start in range(0, source.numel(), _PIECE):
        flat[start : start + _PIECE].copy_(values[start : start + _PIECE])
    return target
