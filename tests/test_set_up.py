"""set_up.py: the right PyTorch for the machine, no repeated work, and a clean start after an interruption."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import set_up

ROOT = Path(__file__).resolve().parent.parent


class Machine:
    """Stands in for `python -m venv` and pip: notes each command, makes the environment's Python, fails on demand."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.unreachable: tuple[str, ...] = ()
        self.interrupted_at: str | None = None

    def __call__(self, command: Sequence[str]) -> int:
        self.calls.append(list(command))
        if self.interrupted_at and self.interrupted_at in command:
            raise KeyboardInterrupt
        if "venv" in command:
            python = set_up.interpreter(Path(command[-1]))
            python.parent.mkdir(parents=True)
            python.touch()
        return int(any(part in word for part in self.unreachable for word in command))

    def pip_calls(self) -> list[list[str]]:
        return [call for call in self.calls if "pip" in call]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what set_up.py reads, in a folder with blanks in its name."""
    root = tmp_path / "a folder with blanks"
    root.mkdir()
    for name in (set_up.RUN, set_up.DEV):
        (root / name).write_bytes((ROOT / name).read_bytes())
    return root


@pytest.fixture(autouse=True)
def system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux's rules, wherever the tests run."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(set_up, "WINDOWS", False)


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A PATH without nvidia-smi, and no list of AMD's GPUs, whatever this machine has."""
    (tmp_path / "programs").mkdir()
    monkeypatch.setattr(set_up, "KFD_NODES", tmp_path / "nodes")
    monkeypatch.setattr(set_up, "KFD", tmp_path / "kfd")
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))


@pytest.fixture
def machine() -> Machine:
    return Machine()


def fake_nvidia_smi(folder: Path, cards: str, status: int = 0, driver: str = "580.65.06") -> None:
    """An nvidia-smi that answers `-L` with `cards` and the query for the driver with `driver`."""
    if os.name == "nt":
        lines = ["@echo off", f'if "%1"=="-L" (echo {cards}) else (echo {driver})', f"exit /b {status}"]
        (folder / "nvidia-smi.bat").write_text("\r\n".join(lines), encoding="utf-8")
        return
    program = folder / "nvidia-smi"
    lines = ["#!/bin/sh", f'if [ "$1" = -L ]; then echo "{cards}"; else echo "{driver}"; fi', f"exit {status}", ""]
    program.write_text("\n".join(lines), encoding="utf-8")
    program.chmod(0o755)


def fake_program(folder: Path, name: str, lines: Sequence[str]) -> None:
    """A program that prints these lines, whatever it is asked."""
    if os.name == "nt":
        text = "\r\n".join(["@echo off", *(f"echo {line}" for line in lines)])
        (folder / f"{name}.bat").write_text(text, encoding="utf-8")
        return
    quoted = [f"echo '{line}'" for line in lines]
    (folder / name).write_text("\n".join(["#!/bin/sh", *quoted, ""]), encoding="utf-8")
    (folder / name).chmod(0o755)


CARD = "GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-00000000-0000-0000-0000-000000000000)"


def test_with_a_card_the_cuda_build_of_pytorch(project: Path, machine: Machine, tmp_path: Path) -> None:
    fake_nvidia_smi(tmp_path / "programs", CARD)
    assert set_up.main([], project, machine) == 0
    torch = machine.pip_calls()[0]
    assert "torch==2.13.0+cu130" in torch
    assert "https://download.pytorch.org/whl/cu130" in torch


def test_without_a_card_the_cpu_build(project: Path, machine: Machine) -> None:
    assert set_up.main([], project, machine) == 0
    torch = machine.pip_calls()[0]
    assert "torch==2.13.0+cpu" in torch
    assert "https://download.pytorch.org/whl/cpu" in torch
    assert not [word for call in machine.calls for word in call if "cu1" in word]


@pytest.mark.parametrize(
    ("cards", "status"),
    [("NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.", 9), ("No devices found.", 0)],
)
def test_a_driver_without_a_gpu_gets_the_cpu_build(
    project: Path, machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str], cards: str, status: int
) -> None:
    fake_nvidia_smi(tmp_path / "programs", cards, status)
    set_up.main([], project, machine)
    assert "torch==2.13.0+cpu" in machine.pip_calls()[0]
    assert cards in capsys.readouterr().out


# rocminfo of a Ryzen 7950X with a Radeon RX 7900 XTX, shortened
ROCMINFO = (
    "  Name:                    AMD Ryzen 9 7950X",
    "  Marketing Name:          AMD Ryzen 9 7950X",
    "  Name:                    gfx1100",
    "  Marketing Name:          Radeon RX 7900 XTX",
    "      Name:                    amdgcn-amd-amdhsa--gfx1100",
    "  Name:                    gfx1036",
)


def test_with_amds_gpu_the_rocm_build_and_what_belongs_to_it(
    project: Path, machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_program(tmp_path / "programs", "rocminfo", ROCMINFO)
    assert set_up.main([], project, machine) == 0
    torch = machine.pip_calls()[0]
    assert "torch==2.13.0+rocm7.2" in torch and "--no-deps" not in torch
    assert torch[torch.index("--index-url") + 1] == "https://download.pytorch.org/whl/rocm7.2"
    out = capsys.readouterr().out
    assert "AMD GPU gfx1100:" in out and "gfx1036" not in out


def test_without_rocminfo_the_kernel_tells(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As kfd_topology.c writes it: nodes of processors have the version 0."""
    for number, version in enumerate((0, 90402)):
        (tmp_path / "nodes" / str(number)).mkdir(parents=True)
        text = f"simd_count 304\ngfx_target_version {version}\nvendor_id 4098\n"
        (tmp_path / "nodes" / str(number) / "properties").write_text(text, encoding="ascii")
    set_up.main(["--dry_run"], project)
    assert "2.13.0+rocm7.2" in capsys.readouterr().out
    (tmp_path / "nodes" / "1" / "properties").write_text("gfx_target_version 100306\n", encoding="ascii")
    set_up.main(["--dry_run"], project)
    out = capsys.readouterr().out
    assert "gfx1036" in out and "no kernels" in out and "2.13.0+cpu" in out


@pytest.mark.parametrize(
    ("adapters", "build", "index"),
    [
        (["AMD Radeon RX 7900 XTX"], "torch[device-all]==2.13.0+rocm10.0.0", set_up.AMD_INDEX),
        (["Microsoft Basic Display", "AMD Radeon(TM) 8060S Graphics"], "torch[device-all]==2.13.0+rocm10.0.0", "amd"),
        (["AMD Radeon(TM) Graphics"], "torch==2.13.0+cpu", "whl/cpu"),
        (["Intel(R) Arc(TM) B580 Graphics"], "torch==2.13.0+xpu", "https://download.pytorch.org/whl/xpu"),
        (["Intel(R) UHD Graphics 770"], "torch==2.13.0+cpu", "whl/cpu"),
    ],
)
def test_windows_names_its_adapters(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    adapters: list[str], build: str, index: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(set_up, "WINDOWS", True)
    fake_program(tmp_path / "programs", "powershell", adapters)
    set_up.main(["--dry_run"], project)
    out = capsys.readouterr().out
    assert build in out and index in out


@pytest.mark.parametrize(
    ("line", "build"),
    [
        ("03:00.0 VGA compatible controller: Intel Corporation DG2 [Arc A770] (rev 08)", "xpu"),
        ("00:02.0 VGA compatible controller: Intel Corporation Lunar Lake [Intel Arc Graphics 130V / 140V]", "xpu"),
        ("00:02.0 VGA compatible controller: Intel Corporation AlderLake-S GT1 [UHD Graphics 770]", "cpu"),
        ("00:1f.3 Audio device: Intel Corporation DG2 Audio Controller [Arc]", "cpu"),
    ],
)
def test_intels_gpus_under_linux(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, build: str
) -> None:
    fake_program(tmp_path / "programs", "lspci", [line])
    set_up.main(["--dry_run"], project)
    out = capsys.readouterr().out
    assert f"torch==2.13.0+{build}" in out
    assert ("--no-deps" in out) == (build == "cpu")


def test_nvidias_card_comes_first(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_program(tmp_path / "programs", "rocminfo", ROCMINFO)
    fake_nvidia_smi(tmp_path / "programs", CARD)
    set_up.main(["--dry_run"], project)
    assert "2.13.0+cu130" in capsys.readouterr().out


def test_an_old_driver_is_reported(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_nvidia_smi(tmp_path / "programs", CARD, driver="535.183.01")
    set_up.main(["--dry_run"], project)
    out = capsys.readouterr().out
    assert "535.183.01" in out and "update the driver" in out
    fake_nvidia_smi(tmp_path / "programs", CARD, driver="580.65.06")
    set_up.main(["--dry_run"], project)
    assert "update the driver" not in capsys.readouterr().out


def test_the_environment_comes_first_then_pytorch_then_the_rest(project: Path, machine: Machine) -> None:
    set_up.main([], project, machine)
    venv = project / ".venv"
    assert machine.calls[0] == [sys.executable, "-m", "venv", str(venv)]
    assert all(call[0] == str(set_up.interpreter(venv)) for call in machine.calls[1:])
    assert machine.calls[2][-2:] == ["-r", str(project / "requirements.txt")]
    assert len(machine.calls) == 3


def test_on_macos_the_build_is_pips_own(project: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    set_up.main([], project, machine)
    assert [call[-2:] for call in machine.pip_calls()] == [["-r", str(project / "requirements.txt")]]


@pytest.mark.parametrize("arguments", [[], ["--dev"]])
def test_a_second_run_calls_nothing(
    project: Path, machine: Machine, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    set_up.main(arguments, project, machine)
    machine.calls.clear()
    assert set_up.main(arguments, project, machine) == 0
    assert machine.calls == []
    assert "ready" in capsys.readouterr().out


def test_dev_packages_are_added_and_stay(project: Path, machine: Machine) -> None:
    set_up.main([], project, machine)
    machine.calls.clear()
    set_up.main(["--dev"], project, machine)
    assert not [call for call in machine.calls if "venv" in call]
    assert machine.calls[-1][-2:] == ["-r", str(project / "requirements-dev.txt")]
    machine.calls.clear()
    set_up.main([], project, machine)
    assert machine.calls == []


def test_new_pins_are_installed(project: Path, machine: Machine) -> None:
    set_up.main([], project, machine)
    machine.calls.clear()
    with (project / "requirements.txt").open("a", encoding="utf-8") as file:
        file.write("one-more==1.0\n")
    set_up.main([], project, machine)
    assert machine.calls[-1][-1] == str(project / "requirements.txt")
    assert not [call for call in machine.calls if "venv" in call]


def test_other_line_endings_do_not_count_as_new_pins(project: Path, machine: Machine) -> None:
    set_up.main([], project, machine)
    machine.calls.clear()
    pins = (project / "requirements.txt").read_bytes().replace(b"\n", b"\r\n")
    (project / "requirements.txt").write_bytes(pins)
    set_up.main([], project, machine)
    assert machine.calls == []


def test_a_new_card_changes_the_build_unless_one_was_named(project: Path, machine: Machine, tmp_path: Path) -> None:
    set_up.main([], project, machine)
    fake_nvidia_smi(tmp_path / "programs", CARD)
    machine.calls.clear()
    set_up.main([], project, machine)
    assert "torch==2.13.0+cu130" in machine.pip_calls()[0]
    set_up.main(["--torch", "cu126"], project, machine)
    machine.calls.clear()
    set_up.main(["--dev"], project, machine)
    assert "torch==2.13.0+cu126" in machine.pip_calls()[0]
    set_up.main(["--torch", "auto"], project, machine)
    assert "torch==2.13.0+cu130" in machine.pip_calls()[-2]


def test_an_unreachable_pytorch_index_falls_back_with_a_message(
    project: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.unreachable = ("download.pytorch.org",)
    assert set_up.main([], project, machine) == 0
    first, second = machine.pip_calls()[:2]
    assert "--retries" in first and "--timeout" in first
    # The same build by its full version: an index with CUDA builds only cannot match.
    assert "torch==2.13.0+cpu" in second and "--index-url" not in second
    assert "did not work" in capsys.readouterr().out


def test_a_build_that_does_not_exist_is_an_error_with_a_remedy(
    project: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.unreachable = ("torch==",)
    assert set_up.main([], project, machine) == 1
    error = capsys.readouterr().err
    assert "2.13.0+cpu" in error and "--torch" in error


def test_an_interrupted_set_up_starts_from_scratch(project: Path, machine: Machine) -> None:
    machine.interrupted_at = "-r"
    assert set_up.main([], project, machine) == 130
    half_done = project / ".venv" / "half a package"
    half_done.mkdir()
    machine.interrupted_at = None
    machine.calls.clear()
    assert set_up.main([], project, machine) == 0
    assert not half_done.exists()
    assert "venv" in machine.calls[0] and len(machine.calls) == 3


def test_a_failed_update_keeps_the_old_environment(project: Path, machine: Machine) -> None:
    set_up.main([], project, machine)
    kept = project / ".venv" / "installed"
    kept.touch()
    machine.unreachable = ("requirements-dev",)
    assert set_up.main(["--dev"], project, machine) == 1
    machine.calls.clear()
    assert set_up.main([], project, machine) == 0
    assert machine.calls == [] and kept.exists()


def test_a_moved_environment_is_created_again(project: Path, machine: Machine) -> None:
    set_up.main([], project, machine)
    machine.calls.clear()
    moved = project.rename(project.with_name("elsewhere"))
    set_up.main([], moved, machine)
    assert "venv" in machine.calls[0]


def test_an_environment_that_set_up_did_not_create_is_left_alone(
    project: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = project / ".venv" / "mine"
    mine.mkdir(parents=True)
    assert set_up.main([], project, machine) == 1
    assert mine.exists() and machine.calls == []
    assert "did not create it" in capsys.readouterr().err


def test_dry_run_only_prints_the_commands(project: Path, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert set_up.main(["--dry_run", "--dev"], project, machine) == 0
    shown = capsys.readouterr().out
    assert machine.calls == [] and not (project / ".venv").exists()
    assert "-m venv" in shown and "torch==2.13.0+cpu" in shown and "requirements-dev.txt" in shown


def test_the_path_of_python_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    venv = Path("project") / ".venv"
    monkeypatch.setattr(os, "name", "nt")
    assert set_up.interpreter(venv).parts[-2:] == ("Scripts", "python.exe")
    monkeypatch.setattr(os, "name", "posix")
    assert set_up.interpreter(venv).parts[-2:] == ("bin", "python")


def test_an_old_python_gets_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or newer; this is Python 3\.10"):
        runpy.run_path(str(ROOT / "set_up.py"), run_name="__main__")
