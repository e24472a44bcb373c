"""What no shape shows of a device's memory. Data: each entry says where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from library.runtime.device import DeviceKind

MIB = 2**20


@dataclass(frozen=True)
class DeviceMemory:
    """`context`: bytes of the driver and of libraries, which torch does not count as allocated. `workspace`: bytes that
    torch allocates for libraries. `granularity`: sizes of blocks are multiples of it. `wide_norms`: autocast normalises
    in fp32. `attention_extra`: bytes for each value of the queries in attention's backward pass. `spare`: share of the
    memory that fragmentation may take."""

    context: int
    workspace: int
    granularity: int
    wide_norms: bool
    attention_extra: int
    spare: float


CUDA = DeviceMemory(
    context=500 * MIB,  # assumed: 300 to 600 MiB by card and driver
    workspace=72 * MIB,  # assumed: cuBLAS 8 MiB and cuBLASLt 32 MiB at most, and cuDNN's for one convolution
    granularity=512,  # c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize
    wide_norms=True,  # layer_norm and group_norm are in autocast's fp32 list for CUDA
    attention_extra=4,  # FlashAttention 2 adds up the gradient of the queries in fp32 (arXiv 2307.08691)
    spare=0.05,  # assumed
)
XPU = CUDA  # assumed: torch's allocator for it is that for CUDA; nothing was measured there
MPS = DeviceMemory(0, 0, 1, wide_norms=True, attention_extra=0, spare=0.05)
CPU = DeviceMemory(
    context=390 * MIB,  # measured: what Python and the imports take (benchmarks/RESULTS.md)
    workspace=300 * MIB,  # measured there: what SD1.5's runs take beyond what is counted (oneDNN's reordered weights)
    granularity=1,
    wide_norms=False,  # the list for CPUs has no norms
    attention_extra=0,
    spare=0.0,
)
DEVICES: dict[DeviceKind, DeviceMemory] = {"cuda": CUDA, "xpu": XPU, "mps": MPS, "cpu": CPU}

STEP_COPIES: dict[str, float] = {
    "torch.optim.adamw.AdamW": 0.0,  # one kernel updates in place
    "schedulefree.adamw_schedulefree.AdamWScheduleFree": 1.0,  # a denominator for all weights at once (foreach)
    "schedulefree.radam_schedulefree.RAdamScheduleFree": 1.0,
}
"""Copies of all trained weights that an optimizer makes during its step, in their format; others make a few of one
weight."""
COPIES_OF_THE_LARGEST = 3
"""Copies of the largest weight, in fp32, that an optimizer written in Python makes in its step."""
