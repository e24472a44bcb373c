"""describe_machine on this machine and on simulated ones."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from library.runtime import cards, device
from library.runtime.cards import Card, find_card
from library.runtime.device import cpu_is_forced, describe_machine
from library.runtime.torch_build import TorchBuild, read_torch_build

CUDA_BUILD = TorchBuild("2.13.0+cu130", cuda="13.0")


def pretend(monkeypatch: pytest.MonkeyPatch, build: TorchBuild, card: Card | None) -> None:
    monkeypatch.setattr(device, "read_torch_build", lambda: build)
    monkeypatch.setattr(cards, "ask_nvidia_driver", lambda: card)
    monkeypatch.setattr(device.sys, "platform", "linux")


def test_it_agrees_with_torch_and_the_system() -> None:
    import os

    import torch

    machine = describe_machine()
    assert (machine.kind == "cuda") == torch.cuda.is_available()
    assert machine.torch.version == torch.__version__
    assert machine.torch.cuda == (torch.version.cuda or "")
    assert 1 <= machine.cpu_count <= (os.cpu_count() or 1)
    assert machine.system_memory_bytes is None or machine.system_memory_bytes > 2**28


def test_a_card_is_found_through_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, CUDA_BUILD, Card("NVIDIA Pretend 9000", 24 * 2**30, (8, 6)))
    machine = describe_machine({})
    assert (machine.kind, machine.name, machine.memory_bytes) == ("cuda", "NVIDIA Pretend 9000", 24 * 2**30)
    assert machine.compute_capability == (8, 6)
    assert not machine.is_cpu


@pytest.mark.parametrize("value", ["", " ", "-1"])
def test_an_empty_cuda_visible_devices_means_no_card(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    pretend(monkeypatch, CUDA_BUILD, Card("NVIDIA Pretend 9000"))
    assert describe_machine({"CUDA_VISIBLE_DEVICES": value}).is_cpu
    assert not describe_machine({"CUDA_VISIBLE_DEVICES": "1"}).is_cpu


@pytest.mark.parametrize("value", ["true", "True", "1", "yes", "on"])
def test_accelerate_can_ask_for_the_cpu(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    pretend(monkeypatch, CUDA_BUILD, Card("NVIDIA Pretend 9000"))
    assert cpu_is_forced({"ACCELERATE_USE_CPU": value})
    assert describe_machine({"ACCELERATE_USE_CPU": value}).is_cpu
    assert not cpu_is_forced({"ACCELERATE_USE_CPU": "false"})


def test_a_card_is_no_use_to_a_cpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, TorchBuild("2.13.0+cpu"), Card("NVIDIA Pretend 9000"))
    assert describe_machine({}).is_cpu


def test_no_driver_library_means_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cards.ctypes, "CDLL", missing)
    monkeypatch.setattr(device.sys, "platform", "linux")
    assert find_card(CUDA_BUILD, {}) is None


def driver(cards: int, broken: bool = False) -> SimpleNamespace:
    """A stand-in for libcuda: functions fill their output arguments and return 0."""

    def fill(reference, value) -> int:
        reference._obj.value = value
        return 0

    def name(buffer, size, index) -> int:
        buffer.value = b"NVIDIA Pretend"
        return 0

    return SimpleNamespace(
        cuInit=lambda flags: 100 if broken else 0,
        cuDeviceGetCount=lambda count: fill(count, cards),
        cuDeviceGet=lambda reference, index: fill(reference, 0),
        cuDeviceGetName=name,
        cuDeviceTotalMem_v2=lambda reference, index: fill(reference, 12 * 2**30),
        cuDeviceGetAttribute=lambda reference, attribute, index: fill(reference, {75: 9, 76: 0}[attribute]),
    )


def test_the_drivers_answers_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.sys, "platform", "linux")
    monkeypatch.setattr(cards.ctypes, "CDLL", lambda name: driver(1))
    assert cards.ask_nvidia_driver() == Card("NVIDIA Pretend", 12 * 2**30, (9, 0))
    monkeypatch.setattr(cards.ctypes, "CDLL", lambda name: driver(0))
    assert cards.ask_nvidia_driver() is None
    monkeypatch.setattr(cards.ctypes, "CDLL", lambda name: driver(1, broken=True))
    assert cards.ask_nvidia_driver() is None


def test_the_windows_driver_has_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(device.sys, "platform", "win32")
    monkeypatch.setattr(cards.ctypes, "WinDLL", lambda name: asked.append(name) or driver(1), raising=False)
    assert cards.ask_nvidia_driver() == Card("NVIDIA Pretend", 12 * 2**30, (9, 0))
    assert asked == ["nvcuda.dll"]


def compute_node(folder: Path, gfx_target_version: int, memory: int) -> None:
    """A node of the Linux kernel's list, as kfd_topology.c writes it: a processor has the version 0 and system memory
    (heap type 0), a GPU its own (1 or 2)."""
    bank = folder / "mem_banks" / "0"
    bank.mkdir(parents=True)
    lines = ["cpu_cores_count 0", "simd_count 96", f"gfx_target_version {gfx_target_version}", "vendor_id 4098"]
    (folder / "properties").write_text("\n".join(lines) + "\n", encoding="ascii")
    heap = 1 if gfx_target_version else 0
    (bank / "properties").write_text(f"heap_type {heap}\nsize_in_bytes {memory}\nflags 0\n", encoding="ascii")


ROCM_BUILD = TorchBuild("2.13.0+rocm7.2", hip="7.2.26015")
INSTINCT = Card("AMD GPU gfx90a", 64 * 2**30, architecture="gfx90a")
RADEON = Card("AMD GPU gfx1100", 24 * 2**30, architecture="gfx1100")


def test_amds_cards_are_read_from_the_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compute_node(tmp_path / "0", 0, 32 * 2**30)
    compute_node(tmp_path / "1", 90010, 64 * 2**30)
    compute_node(tmp_path / "10", 110000, 24 * 2**30)
    monkeypatch.setattr(cards, "KFD_NODES", tmp_path)
    monkeypatch.setattr(cards.sys, "platform", "linux")
    assert list(cards.amd_compute_nodes()) == [INSTINCT, RADEON]
    assert find_card(ROCM_BUILD, {}) == INSTINCT
    assert find_card(ROCM_BUILD, {"HIP_VISIBLE_DEVICES": "1,0"}) == RADEON
    assert find_card(ROCM_BUILD, {"HIP_VISIBLE_DEVICES": "-1"}) is None
    monkeypatch.setattr(device, "read_torch_build", lambda: ROCM_BUILD)
    machine = describe_machine({"ROCR_VISIBLE_DEVICES": "1"})
    assert (machine.kind, machine.architecture, machine.memory_bytes) == ("cuda", "gfx1100", 24 * 2**30)
    assert machine.is_amd and machine.compute_capability is None
    monkeypatch.setattr(cards, "KFD_NODES", tmp_path / "no driver")
    assert describe_machine({}).is_cpu


def test_amds_card_under_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """HIP's functions are CUDA's under other names (hip_runtime_api.h)."""
    asked = []

    def library(cards_there: int, at: str, name: str) -> SimpleNamespace:
        asked.append(name)
        if name != at:
            raise OSError("not found")
        cuda = driver(cards_there)
        return SimpleNamespace(
            hipGetDeviceCount=cuda.cuDeviceGetCount,
            hipDeviceGetName=cuda.cuDeviceGetName,
            hipDeviceTotalMem=cuda.cuDeviceTotalMem_v2,
        )

    monkeypatch.setattr(cards.sys, "platform", "win32")
    monkeypatch.setattr(cards.ctypes, "WinDLL", partial(library, 1, "amdhip64_6.dll"), raising=False)
    assert find_card(ROCM_BUILD, {}) == Card("NVIDIA Pretend", 12 * 2**30)
    assert asked == ["amdhip64_7.dll", "amdhip64_6.dll"]
    monkeypatch.setattr(cards.ctypes, "WinDLL", partial(library, 0, "amdhip64_7.dll"))
    assert find_card(ROCM_BUILD, {}) is None
    monkeypatch.setattr(cards.ctypes, "WinDLL", partial(library, 1, "of another version"))
    assert find_card(ROCM_BUILD, {}) == Card("AMD GPU")


@pytest.mark.parametrize(("vendor", "kind"), [("0x8086", "xpu"), ("0x1002", "cpu")])
def test_intels_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vendor: str, kind: str) -> None:
    (tmp_path / "card1" / "device").mkdir(parents=True)
    (tmp_path / "card1" / "device" / "vendor").write_text(f"{vendor}\n", encoding="ascii")
    monkeypatch.setattr(cards, "DISPLAY_ADAPTERS", tmp_path)
    pretend(monkeypatch, TorchBuild("2.13.0+xpu", xpu="20260000"), Card("not Intel's"))
    machine = describe_machine({})
    assert machine.kind == kind
    assert not machine.is_amd


VERSIONS = {
    "__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n": TorchBuild(
        "2.13.0+cu130", cuda="13.0"
    ),
    "__version__ = '2.13.0+rocm6.4'\ncuda: Optional[str] = None\nhip: Optional[str] = '6.4.43482'\n": TorchBuild(
        "2.13.0+rocm6.4", hip="6.4.43482"
    ),
    "__version__ = '2.13.0+xpu'\ncuda: Optional[str] = None\nxpu: Optional[str] = '20260000'\n": TorchBuild(
        "2.13.0+xpu", xpu="20260000"
    ),
    "__version__ = '1.13.1'\ncuda = '11.7'\nhip = None\n": TorchBuild("1.13.1", cuda="11.7"),
    "nothing of the kind": TorchBuild(),
}


@pytest.mark.parametrize("text", VERSIONS)
def test_version_files_of_torch_are_read_as_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "version.py").write_text(text, encoding="utf-8")
    assert read_torch_build(tmp_path) == VERSIONS[text]


def test_no_torch_is_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_torch_build(tmp_path) == TorchBuild()
    pretend(monkeypatch, TorchBuild(), Card("NVIDIA Pretend 9000"))
    assert describe_machine({}).is_cpu


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_posix_memory", lambda: 64 * 2**30)
    monkeypatch.setattr(device.sys, "platform", "linux")
    monkeypatch.setattr(device, "_container_limit", lambda: 8 * 2**30)
    assert device.system_memory() == 8 * 2**30
    monkeypatch.setattr(device, "_container_limit", lambda: None)
    assert device.system_memory() == 64 * 2**30


def test_it_imports_no_torch() -> None:
    program = (
        "import sys; from library.runtime.device import describe_machine; import library.runtime.precision; "
        "describe_machine(); sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0
