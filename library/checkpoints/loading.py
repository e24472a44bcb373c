"""Read many tensors of a mapped file into memory of their own.

torch converts and copies each tensor with all its threads; most of the time is the system handing out the memory.
(Pages of 2 MiB by madvise halve that at best, and cost seconds on virtual machines that give free memory back to the
host. Who wants them sets torch's THP_MEM_ALLOC_ENABLE=1.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from library.checkpoints.lazy import LazyTensor, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

READ_AT_ONCE = 2**27  # bytes of a file in memory at most, but for a larger tensor


def load_tensors(
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    matrices: torch.dtype | None = None,
    let_go: Callable[[], None] | None = None,
    broken: list[str] | None = None,
) -> dict[str, Tensor]:
    """All tensors in memory of their own, so that the file may change afterwards, on `device`.

    Floating ones are converted to `dtype` (None: as they are), those of two and more dimensions to `matrices` if that
    is given. Peak memory is the result and little beside it: `let_go` is called from time to time, to give back what
    was read of the file (TensorReader.let_go). `broken` gets the names of tensors with values that are not finite.
    """
    import torch

    on_cpu = torch.device(device).type == "cpu"

    def load(lazy: LazyTensor) -> Tensor:
        to = (matrices if len(lazy.info.shape) > 1 else None) or dtype
        if to is None or not lazy.info.is_float:
            to = torch_dtype(lazy.dtype)
        if on_cpu:
            return lazy.load().to(to, copy=True, memory_format=torch.contiguous_format)
        return lazy.load().to(device).to(to)  # converted there: what crosses the bus is what the file holds

    loaded, read = {}, 0
    for name, lazy in tensors.items():
        loaded[name] = load(lazy)
        if broken is not None and not is_finite(loaded[name]):
            broken.append(name)
        read += lazy.info.nbytes
        if let_go is not None and read >= READ_AT_ONCE:
            let_go()
            read = 0
    return loaded


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. One pass, no copy: greatest minus least is not if any value is not."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    least, greatest = tensor.aminmax()
    return math.isfinite(float(greatest) - float(least))
