"""Detect the machine of a run without importing torch (the plan must be instant).

torch_build.py reads what the installed torch is built for, cards.py finds the GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.runtime.cards import find_card
from library.runtime.torch_build import TorchBuild, read_torch_build

DeviceKind = Literal["cuda", "xpu", "mps", "cpu"]
"""torch's names: "cuda" also of AMD's cards (ROCm), "xpu" Intel's, "mps" Apple's."""

DEVICES: tuple[DeviceKind, ...] = ("cuda", "xpu", "mps", "cpu")
"""Choices of --device."""


@dataclass(frozen=True)
class Machine:
    """The device of a run. `memory_bytes` is the GPU's memory (None: unknown, or no GPU), `compute_capability` NVIDIA's
    (major, minor), `architecture` AMD's (gfx1100; empty: unknown, or no such card), `system_memory_bytes` the main
    memory available to this process."""

    kind: DeviceKind
    name: str
    memory_bytes: int | None = None
    compute_capability: tuple[int, int] | None = None
    has_xformers: bool = False
    cpu_count: int = 1
    system_memory_bytes: int | None = None
    torch: TorchBuild = TorchBuild()
    architecture: str = ""

    @property
    def is_cpu(self) -> bool:
        """Whether the run computes on the CPU."""
        return self.kind == "cpu"

    @property
    def is_amd(self) -> bool:
        """Whether the run computes on an AMD GPU, which torch calls "cuda" too."""
        return self.kind == "cuda" and bool(self.torch.hip)


def describe_machine(environment: Mapping[str, str] | None = None) -> Machine:
    """Detect the device that a run would use: the first visible NVIDIA, AMD or Intel GPU that torch is built for, the
    Apple GPU, else the CPU.

    `environment` replaces os.environ (ACCELERATE_USE_CPU, CUDA_VISIBLE_DEVICES) in tests. Never raises.
    """
    environment = os.environ if environment is None else environment
    build = read_torch_build()
    cpus, memory = usable_cpus(), system_memory()
    has_xformers = importlib.util.find_spec("xformers") is not None
    if not cpu_is_forced(environment):
        card = find_card(build, environment)
        if card is not None:
            facts = (card.memory_bytes, card.capability, has_xformers, cpus, memory, build, card.architecture)
            return Machine(card.kind, card.name, *facts)
        if sys.platform == "darwin" and platform.machine() == "arm64" and build.version:
            return Machine("mps", "Apple GPU", None, None, has_xformers, cpus, memory, build)
    name = f"CPU ({platform.processor() or platform.machine()})"
    return Machine("cpu", name, None, None, has_xformers, cpus, memory, build)


def cpu_is_forced(environment: Mapping[str, str]) -> bool:
    """Whether `accelerate launch --cpu` or its configuration selects the CPU (parsed like accelerate's booleans)."""
    return environment.get("ACCELERATE_USE_CPU", "").strip().lower() in {"1", "true", "yes", "y", "t", "on"}


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def system_memory() -> int | None:
    """Main memory in bytes that this process may use: the computer's, or the container's limit. None: unknown."""
    total = _windows_memory() if sys.platform == "win32" else _posix_memory()
    limit = _container_limit()
    if total is None or limit is None:
        return total
    return min(total, limit)


def _posix_memory() -> int | None:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return None
    return total if total > 0 else None


def _container_limit() -> int | None:
    """The memory limit of Linux control groups (version 2, then 1); None for "max" or no file."""
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(file).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
    return None


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = [
        ("dwLength", ctypes.c_ulong),
        ("dwMemoryLoad", ctypes.c_ulong),
        ("ullTotalPhys", ctypes.c_ulonglong),
        ("ullAvailPhys", ctypes.c_ulonglong),
        ("ullTotalPageFile", ctypes.c_ulonglong),
        ("ullAvailPageFile", ctypes.c_ulonglong),
        ("ullTotalVirtual", ctypes.c_ulonglong),
        ("ullAvailVirtual", ctypes.c_ulonglong),
        ("ullAvailExtendedVirtual", ctypes.c_ulonglong),
    ]


def _windows_memory() -> int | None:
    status = _MemoryStatus(dwLength=ctypes.sizeof(_MemoryStatus))
    windll = getattr(ctypes, "windll", None)
    if windll is None or not windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(status.ullTotalPhys)
