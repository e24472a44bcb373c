"""Find the graphics card of a run without importing torch: by the drivers' own libraries, or by what the kernel says.

NVIDIA by the CUDA driver API; AMD under Windows by the HIP runtime, which has the same functions, and under Linux by
the kernel's list of compute nodes (/sys/class/kfd/kfd/topology, drivers/gpu/drm/amd/amdkfd/kfd_topology.c); Intel under
Linux by the vendor of each display adapter.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.runtime.torch_build import TorchBuild

CardKind = Literal["cuda", "xpu"]
"""torch's name of the device: "cuda" of NVIDIA's and AMD's cards, "xpu" of Intel's."""

KFD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")
DISPLAY_ADAPTERS = Path("/sys/class/drm")
_INTEL = "0x8086"  # its PCI vendor number
_HIP_LIBRARIES = ("amdhip64_7.dll", "amdhip64_6.dll", "amdhip64.dll")  # AMD's display driver installs one of them
_VISIBLE = {
    "nvidia": ("CUDA_VISIBLE_DEVICES",),
    "amd": ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
}
_DEVICE_MEMORY = ("1", "2")  # heap types of a compute node: HSA_MEM_HEAP_TYPE_FB_PUBLIC, _FB_PRIVATE


@dataclass(frozen=True)
class Card:
    """A GPU as described by its driver. `capability` is NVIDIA's (major, minor), `architecture` AMD's (gfx1100)."""

    name: str
    memory_bytes: int | None = None
    capability: tuple[int, int] | None = None
    architecture: str = ""
    kind: CardKind = "cuda"


def find_card(build: TorchBuild, environment: Mapping[str, str]) -> Card | None:
    """The first visible GPU that torch is built for, or None. Never raises."""
    if build.cuda:
        return None if hidden("nvidia", environment) else ask_nvidia_driver()
    if build.hip:
        return None if hidden("amd", environment) else _amd_card(environment)
    if build.xpu:
        return _intel_card()
    return None


def hidden(vendor: Literal["nvidia", "amd"], environment: Mapping[str, str]) -> bool:
    """Whether a variable like CUDA_VISIBLE_DEVICES hides all cards: it is empty or -1."""
    values = [environment[name] for name in _VISIBLE[vendor] if name in environment]
    return any(value.strip() in {"", "-1"} for value in values)


def ask_nvidia_driver() -> Card | None:
    """The first visible NVIDIA GPU from the CUDA driver library, or None without GPU or driver."""
    try:
        return _first_card(_library("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"))
    except (OSError, AttributeError):
        return None


def _library(name: str) -> ctypes.CDLL:
    """A driver's library. Raises OSError if there is none."""
    if sys.platform == "win32":
        return ctypes.WinDLL(name)
    return ctypes.CDLL(name)


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


def _amd_card(environment: Mapping[str, str]) -> Card | None:
    """The first visible AMD GPU. With Windows' driver of another version it has no name, but is there: torch is built
    for it, which nobody has by accident."""
    if sys.platform == "win32":
        return ask_hip_runtime()
    cards = list(amd_compute_nodes())
    numbers = [environment[name].split(",")[0].strip() for name in _VISIBLE["amd"] if name in environment]
    first = int(numbers[0]) if numbers and numbers[0].isdigit() else 0  # a card's unique number is not looked up
    return cards[min(first, len(cards) - 1)] if cards else None


def ask_hip_runtime() -> Card | None:
    """The first AMD GPU from the HIP runtime of Windows' display driver; None if the driver says that there is none."""
    for name in _HIP_LIBRARIES:
        try:
            driver = _library(name)
        except OSError:
            continue
        count, text, memory = ctypes.c_int(0), ctypes.create_string_buffer(256), ctypes.c_size_t(0)
        if driver.hipGetDeviceCount(ctypes.byref(count)) or count.value < 1:
            return None
        named = driver.hipDeviceGetName(text, len(text), 0) == 0
        has_memory = driver.hipDeviceTotalMem(ctypes.byref(memory), 0) == 0
        title = text.value.decode("utf-8", "replace") if named else "AMD GPU"
        return Card(title, memory.value if has_memory else None)
    return Card("AMD GPU")


def amd_compute_nodes() -> Iterator[Card]:
    """The AMD GPUs that the Linux kernel offers for computing, in its order, which is also HIP's."""
    try:
        nodes = sorted((node for node in KFD_NODES.iterdir() if node.name.isdigit()), key=lambda node: int(node.name))
    except OSError:
        return
    for node in nodes:
        facts = _numbers(node / "properties")
        version = int(facts.get("gfx_target_version", "0"))
        if not version:  # a processor
            continue
        name = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
        banks = [_numbers(bank) for bank in node.glob("mem_banks/*/properties")]
        memory = sum(int(bank["size_in_bytes"]) for bank in banks if bank.get("heap_type") in _DEVICE_MEMORY)
        yield Card(f"AMD GPU {name}", memory or None, architecture=name)


def _numbers(file: Path) -> dict[str, str]:
    """The lines "name number" of a file of the kernel; nothing if it cannot be read."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    pairs = [line.split() for line in lines]
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _intel_card() -> Card | None:
    """Intel's GPU, without its memory, which neither the kernel nor Windows tells."""
    if sys.platform == "win32" or any(vendor == _INTEL for vendor in _display_vendors()):
        return Card("Intel GPU", kind="xpu")
    return None


def _display_vendors() -> Iterator[str]:
    """The PCI vendor of each display adapter ("0x8086"), under Linux."""
    for file in sorted(DISPLAY_ADAPTERS.glob("card*/device/vendor")):
        try:
            yield file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
