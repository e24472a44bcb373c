"""Detect the machine of a run without importing torch (the plan must be instant).

The torch build is read from the text of its version file, and the GPU is queried through the driver library.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DeviceKind = Literal["cuda", "mps", "cpu"]


@dataclass(frozen=True)
class TorchBuild:
    """Version, CUDA and ROCm of the installed torch; empty if it was built without, or is not installed."""

    version: str = ""
    cuda: str = ""
    hip: str = ""


@dataclass(frozen=True)
class Machine:
    """The device of a run. `memory_bytes` is the GPU's memory (None: unknown, or no GPU), `compute_capability` NVIDIA's
    (major, minor), `system_memory_bytes` the main memory available to this process."""

    kind: DeviceKind
    name: str
    memory_bytes: int | None = None
    compute_capability: tuple[int, int] | None = None
    has_xformers: bool = False
    cpu_count: int = 1
    system_memory_bytes: int | None = None
    torch: TorchBuild = TorchBuild()

    @property
    def is_cpu(self) -> bool:
        """Whether the run computes on the CPU."""
        return self.kind == "cpu"


def describe_machine(environment: Mapping[str, str] | None = None) -> Machine:
    """Detect the device that a run would use: the first visible NVIDIA (or ROCm) GPU, the Apple GPU, else the CPU.

    `environment` replaces os.environ (ACCELERATE_USE_CPU, CUDA_VISIBLE_DEVICES) in tests. Never raises.
    """
    environment = os.environ if environment is None else environment
    build = read_torch_build()
    cpus, memory = usable_cpus(), system_memory()
    has_xformers = importlib.util.find_spec("xformers") is not None
    if not cpu_is_forced(environment):
        card = find_card(build, environment)
        if card is not None:
            return Machine("cuda", card.name, card.memory_bytes, card.capability, has_xformers, cpus, memory, build)
        if sys.platform == "darwin" and platform.machine() == "arm64" and build.version:
            return Machine("mps", "Apple GPU", None, None, has_xformers, cpus, memory, build)
    name = f"CPU ({platform.processor() or platform.machine()})"
    return Machine("cpu", name, None, None, has_xformers, cpus, memory, build)


def cpu_is_forced(environment: Mapping[str, str]) -> bool:
    """Whether `accelerate launch --cpu` or its configuration selects the CPU (parsed like accelerate's booleans)."""
    return environment.get("ACCELERATE_USE_CPU", "").strip().lower() in {"1", "true", "yes", "y", "t", "on"}


def read_torch_build(package: Path | None = None) -> TorchBuild:
    """Read the torch build from its `version.py` as text. `package` is torch's folder."""
    if package is None:
        try:
            found = importlib.util.find_spec("torch")
        except (ImportError, ValueError):
            found = None
        if found is None or found.origin is None:
            return TorchBuild()
        package = Path(found.origin).parent
    try:
        text = (package / "version.py").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return TorchBuild()

    def value(name: str) -> str:
        found = re.search(rf"^{name}\s*(?::[^=\n]*)?=\s*['\"]([^'\"]*)['\"]", text, re.MULTILINE)
        return found.group(1) if found else ""

    return TorchBuild(value("__version__"), value("cuda"), value("hip"))


@dataclass(frozen=True)
class Card:
    """A GPU as described by its driver."""

    name: str
    memory_bytes: int | None = None
    capability: tuple[int, int] | None = None


def find_card(build: TorchBuild, environment: Mapping[str, str]) -> Card | None:
    """The first visible GPU that this torch build supports, or None."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in {"", "-1"}:
        return None
    if build.cuda:
        return ask_nvidia_driver()
    if build.hip and Path("/dev/kfd").exists():
        return Card("AMD GPU (ROCm)")
    return None


def ask_nvidia_driver() -> Card | None:
    """The first visible NVIDIA GPU from the CUDA driver library, or None without GPU or driver."""
    try:
        if sys.platform == "win32":
            driver: ctypes.CDLL = ctypes.WinDLL("nvcuda.dll")
        else:
            driver = ctypes.CDLL("libcuda.so.1")
        return _first_card(driver)
    except (OSError, AttributeError):
        return None


def _first_card(driver: ctypes.CDLL) -> Card | None:
    """Query the CUDA driver API, whose functions return 0 on success."""
    count, device = ctypes.c_int(0), ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value < 1:
        return None
    if driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t(0)
    driver.cuDeviceGetName(name, len(name), device)
    has_memory = driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device) == 0
    parts = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        part = ctypes.c_int(0)
        if driver.cuDeviceGetAttribute(ctypes.byref(part), attribute, device) == 0:
            parts.append(part.value)
    capability = (parts[0], parts[1]) if len(parts) == 2 else None
    return Card(name.value.decode("utf-8", "replace"), memory.value if has_memory else None, capability)


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
