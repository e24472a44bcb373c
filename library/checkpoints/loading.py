"""Copy many tensors of a mapped file into memory.

torch converts and copies each tensor with all its threads; allocating the memory takes most of the time. (Huge pages of
2 MiB halve that at best, and cost seconds on virtual machines that return free memory to the host. Set torch's
THP_MEM_ALLOC_ENABLE=1 to use them.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from library.checkpoints.lazy import LazyTensor, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

READ_AT_ONCE = 2**27  # bytes of a file held in memory, unless one tensor is larger


def load_tensors(
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype | None = None,
    matrix_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    release: Callable[[], None] | None = None,
    broken: list[str] | None = None,
    pack: Callable[[str, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Copy tensors to `device`, independent of the file they are read from.

    Floating-point tensors are converted to `dtype` (None: unchanged); those with two or more dimensions to
    `matrix_dtype`, if set. Peak memory is the result plus little more: `release` (TensorReader.release) is called every
    READ_AT_ONCE bytes to free the pages already read. Names of tensors with NaN or infinite values are added to
    `broken`. `pack` returns what to keep of a tensor, and gets its name first.
    """
    import torch

    on_cpu = torch.device(device).type == "cpu"

    def load(lazy: LazyTensor) -> Tensor:
        to = (matrix_dtype if len(lazy.info.shape) > 1 else None) or dtype
        if to is None or not lazy.info.is_float:
            to = torch_dtype(lazy.dtype)
        if on_cpu:
            return lazy.load().to(to, copy=True, memory_format=torch.contiguous_format)
        return lazy.load().to(device).to(to)  # converted on the device: only the file's bytes cross the bus

    loaded, read = {}, 0
    for name, lazy in tensors.items():
        loaded[name] = load(lazy)
        if broken is not None and not is_finite(loaded[name]):
            broken.append(name)
        if pack is not None:
            loaded[name] = pack(name, loaded[name])
        read += lazy.info.nbytes
        if release is not None and read >= READ_AT_ONCE:
            release()
            read = 0
    return loaded


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. One pass, no copy: max minus min is not finite if any value is not."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    least, greatest = tensor.aminmax()
    return math.isfinite(float(greatest) - float(least))
