"""What a graphics card can do besides float32, as its maker documents it. No torch: the plan asks."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.runtime.device import Machine

# AMD's instruction sets have matrix products of bfloat16 from CDNA 1 (gfx908) and RDNA 3 (gfx11) on
_AMD_BF16 = re.compile(r"gfx(908|90a|94\w|95\w|1[1-9]\w\w)")


def computes_bf16(machine: Machine) -> bool | None:
    """Whether a GPU has arithmetic for bfloat16; without, torch converts for each operation, which is slower than
    float32. None: unknown, or no GPU.

    NVIDIA from compute capability 8.0 on (CUDA C programming guide, compute capabilities), AMD see above, Intel all
    that torch supports (Arc, Data Center GPU), Apple's GPUs are not documented.
    """
    if machine.is_amd:
        return bool(_AMD_BF16.fullmatch(machine.architecture)) if machine.architecture else None
    if machine.kind == "cuda":
        return None if machine.compute_capability is None else machine.compute_capability >= (8, 0)
    return True if machine.kind == "xpu" else None


def has_bitsandbytes_optimizers(machine: Machine) -> bool:
    """Whether the optimizers of bitsandbytes run there: not on Apple's GPUs, for which 0.50 has no such kernel (the
    table of its README, "8-bit optimizers"; bitsandbytes/backends/mps/ops.py)."""
    return machine.kind != "mps"


def has_paged_memory(machine: Machine) -> bool:
    """Whether the paged optimizers of bitsandbytes page: they take memory that CUDA (or ROCm) moves by itself, and
    compute on a CPU without."""
    return machine.kind in ("cuda", "cpu")
