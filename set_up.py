"""Create Dreamfolder's environment: `.venv` beside this file, with PyTorch and requirements.txt.

Uses the standard library only, so any Python from 3.11 on can run it. A finished set-up is not repeated; an interrupted
one starts from scratch. Exit status: 0 ready, 1 failed (the remedy is printed), 2 wrong usage, 130 interrupted.
"""

import sys

# First of all, as an older Python would fail below with a SyntaxError or an ImportError.
if sys.version_info < (3, 11):
    sys.exit(
        "Dreamfolder needs Python 3.11 or newer; this is Python %d.%d (%s).\n"
        "Install one from https://www.python.org/downloads/ and run for example: python3.12 set_up.py\n"
        "(for first_run.sh and run_tests.sh set PYTHON: PYTHON=python3.12 ./first_run.sh)"
        % (*sys.version_info[:2], sys.executable)
    )

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
RUN, DEV = "requirements.txt", "requirements-dev.txt"  # the latter includes the former
PYTORCH_INDEX = "https://download.pytorch.org/whl/"
AMD_INDEX = "https://stable.repo.amd.com/rocm/whl-next/"  # PyTorch has no ROCm build for Windows, AMD has
CPU, CUDA, ROCM, ROCM_WINDOWS, XPU = "cpu", "cu130", "rocm7.2", "rocm10.0.0", "xpu"
# What PyTorch's ROCm build has kernels for (PYTORCH_ROCM_ARCH in .ci/docker/manywheel/build.sh of its release/2.13)
ROCM_TARGETS = (
    "gfx900 gfx906 gfx908 gfx90a gfx942 gfx950 gfx1030 gfx1100 gfx1101 gfx1102 gfx1103 gfx1150 gfx1151 gfx1200 gfx1201"
).split()
KFD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")  # Linux: what the kernel offers for computing on AMD's GPUs
KFD = Path("/dev/kfd")
WINDOWS = os.name == "nt"
DEFAULT_INDEX = "default"  # the build of torch in pip's configured index
OLDEST_DRIVER = 580  # the first driver branch that runs CUDA 13 (NVIDIA's CUDA compatibility table)

NO_VENV = (
    "Python could not create an environment. On Debian and Ubuntu install the package for it: "
    "sudo apt install python3-venv"
)
NO_TORCH = (
    "Neither PyTorch's index nor pip's default index has this build for this Python and system. Check the network, or "
    f"choose another build: --torch cpu, --torch cu126, … (the folders of {PYTORCH_INDEX}), or --torch {DEFAULT_INDEX} "
    "for the build in pip's default index (on Linux with CUDA, several GB)."
)
NO_PACKAGES = "See pip's last lines for the reason. Downloaded packages stay in pip's cache."

Call = Callable[[Sequence[str]], int]


class SetUpError(Exception):
    """The environment could not be created; the text says what to do."""


@dataclass(frozen=True)
class Step:
    """One step: its commands are tried in order until one succeeds. `remedy`: what to do when all fail."""

    title: str
    commands: tuple[tuple[str, ...], ...]
    remedy: str


@dataclass(frozen=True)
class Stamp:
    """The record of a finished set-up in the environment (set_up.json)."""

    place: str  # to notice a moved environment, whose paths are wrong
    torch: str
    torch_asked: bool  # chosen by --torch: later set-ups keep it
    files: dict[str, str]  # requirement file -> fingerprint


# ------------------------------------------------------------------ which build of PyTorch


def ask(name: str, *arguments: str) -> tuple[int, str]:
    """(exit status, output) of a program; 127 and the reason if it is missing or does not finish."""
    program = shutil.which(name)
    if program is None:
        return 127, f"{name} is not on PATH"
    try:
        answer = subprocess.run([program, *arguments], capture_output=True, stdin=subprocess.DEVNULL, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, f"{program} did not run: {error}"
    return answer.returncode, (answer.stdout + answer.stderr).decode("utf-8", errors="replace").strip()


def choose_build(option: str | None, previous: str | None) -> tuple[str, str]:
    """(build of PyTorch, why). `option` is --torch now, `previous` --torch when the environment was created."""
    if option not in (None, "auto"):
        return option, f"PyTorch build {option} (--torch)"
    if option is None and previous is not None:
        return previous, f"PyTorch build {previous} (--torch of an earlier set-up)"
    if sys.platform == "darwin":
        return DEFAULT_INDEX, "PyTorch's build for macOS"
    status, output = ask("nvidia-smi", "-L")
    cards = re.findall(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", output, re.MULTILINE)
    if status == 0 and cards:
        return CUDA, f"NVIDIA GPU {', '.join(cards)}: PyTorch's CUDA build {CUDA}{driver_note()}"
    why = output.splitlines()[0] if output else "nvidia-smi lists none"
    adapters = display_adapters()
    return amd_build(adapters) or intel_build(adapters) or (CPU, f"No GPU found ({why}): PyTorch's CPU build")


def display_adapters() -> list[str]:
    """The names of the display adapters, as Windows or lspci call them; empty if neither tells."""
    if WINDOWS:
        names = "Get-CimInstance Win32_VideoController | ForEach-Object Name"
        status, output = ask("powershell", "-NoProfile", "-NonInteractive", "-Command", names)
        return [line.strip() for line in output.splitlines() if line.strip()] if status == 0 else []
    status, output = ask("lspci")
    return re.findall(r"(?:VGA compatible|3D|Display) controller: (.+)", output) if status == 0 else []


def amd_build(adapters: Sequence[str]) -> tuple[str, str] | None:
    """The ROCm build and why, if there is a GPU that it has kernels for; the CPU build and why if only others."""
    if WINDOWS:
        # the names of Radeon RX 5000 and later, PRO W and R series, and of the larger integrated GPUs of Ryzen AI
        pattern = r"Radeon.*\b(?:RX\s*[5-9]\d{3}|PRO [WVR]\d{4}|R9[67]00|8\d[456]0S|8[89]0M)"
        found = [name for name in adapters if re.search(pattern, name)]
        return (ROCM_WINDOWS, f"AMD GPU {', '.join(found)}: AMD's ROCm build {ROCM_WINDOWS}") if found else None
    targets = rocm_targets()
    found = [target for target in targets if target in ROCM_TARGETS]
    if found:
        return ROCM, f"AMD GPU {', '.join(found)}: PyTorch's ROCm build {ROCM}{kfd_note()}"
    if targets:
        others = f"AMD GPU {', '.join(targets)}: PyTorch's ROCm build has no kernels for it, so its CPU build"
        return CPU, f"{others} (--torch {ROCM} installs the other one)"
    return None


def rocm_targets() -> list[str]:
    """AMD's GPUs under Linux by their instruction sets (gfx1100): by rocminfo, else by the kernel's list."""
    status, output = ask("rocminfo")
    if status == 0:
        return list(dict.fromkeys(re.findall(r"^\s*Name:\s+(gfx\w+)", output, re.MULTILINE)))
    targets: list[str] = []
    for file in sorted(KFD_NODES.glob("*/properties")):
        try:
            version = re.search(r"^gfx_target_version (\d+)", file.read_text(encoding="ascii"), re.MULTILINE)
        except (OSError, UnicodeDecodeError):
            continue
        if version and (number := int(version[1])):  # 0: a processor; 90010 is gfx90a
            targets.append(f"gfx{number // 10000}{number // 100 % 100:x}{number % 100:x}")
    return list(dict.fromkeys(targets))


def kfd_note() -> str:
    """A warning if this user may not compute on AMD's GPUs, else an empty text."""
    if not KFD.exists() or os.access(KFD, os.R_OK | os.W_OK):
        return ""
    return f"\n  This user may not use {KFD}: sudo usermod -a -G render,video $USER, then log in again."


def intel_build(adapters: Sequence[str]) -> tuple[str, str] | None:
    """The build for Intel's GPUs and why, if there is one of those that PyTorch supports: Arc and Data Center GPUs, on
    a card or in a Core Ultra. Those of other processors are too old."""
    found = [name for name in adapters if re.search(r"Intel.*(?:\bArc\b|Data Center GPU|Ponte Vecchio)", name)]
    return (XPU, f"Intel GPU {', '.join(found)}: PyTorch's build {XPU}") if found else None


def driver_note() -> str:
    """A warning if the NVIDIA driver is too old for the CUDA build, else an empty text."""
    status, output = ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    driver = re.match(r"(\d+)\.", output)
    if status != 0 or driver is None or int(driver[1]) >= OLDEST_DRIVER:
        return ""
    return (
        f"\n  The driver {output.splitlines()[0]} is too old for this build, which needs {OLDEST_DRIVER}: "
        "update the driver, or choose an older CUDA build with --torch."
    )


# ------------------------------------------------------------------ the existing environment


def interpreter(venv: Path) -> Path:
    """The Python of an environment."""
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def fingerprint(requirements: Path) -> str:
    """Hash of a requirement file's lines, independent of the line endings."""
    lines = requirements.read_text(encoding="utf-8").splitlines()
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_stamp(venv: Path) -> Stamp | None:
    """The record of the last set-up; None if it did not finish, or if the environment was moved or lost its Python."""
    try:
        stamp = Stamp(**json.loads((venv / "set_up.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    is_usable = stamp.place == str(venv) and interpreter(venv).exists() and not (venv / "set_up.unfinished").exists()
    return stamp if is_usable else None


def remove_broken(venv: Path) -> None:
    """Remove an unfinished, moved or broken environment. SetUpError if set_up.py did not create it."""
    if not venv.exists():
        return
    if not (venv / "set_up.unfinished").exists() and not (venv / "set_up.json").exists():
        raise SetUpError(f"{venv} exists, but set_up.py did not create it. Rename or remove it, then start again.")
    if Path(sys.prefix).resolve() == venv.resolve():
        raise SetUpError(
            f"{venv} must be created again. Run set_up.py with another Python, outside of this environment."
        )
    print(f"{venv} is unfinished, moved or broken: creating it again.")
    shutil.rmtree(venv)


# ------------------------------------------------------------------ the steps


def torch_pin(root: Path) -> str:
    """The version of PyTorch that requirements.txt pins."""
    pin = re.search(r"^torch==([\w.]+)", (root / RUN).read_text(encoding="utf-8"), re.MULTILINE)
    if pin is None:
        raise SetUpError(f"{root / RUN} does not pin torch (torch==…).")
    return pin[1]


def index_of(build: str) -> str:
    """Where a build of PyTorch is: ROCm 10 and later in AMD's index, everything else in PyTorch's."""
    major = re.match(r"rocm(\d+)", build)
    return AMD_INDEX if major and int(major[1]) >= 10 else PYTORCH_INDEX + build


def torch_requirement(root: Path, build: str) -> tuple[str, ...]:
    """What pip is asked for. The packages that the CPU and CUDA builds need are in requirements.txt or in pip's default
    index; those of the builds for AMD and Intel are only beside the build, so pip takes them from there."""
    version = f"=={torch_pin(root)}+{build}"
    if index_of(build) == AMD_INDEX:
        return (f"torch[device-all]{version}",)  # with the kernels of all its targets
    return (f"torch{version}",) if build.startswith(("rocm", "xpu")) else ("--no-deps", f"torch{version}")


def plan(root: Path, build: str, *, dev: bool, fresh: bool) -> list[Step]:
    """The steps, in order. PyTorch goes first, so that its pin in requirements.txt is met and the build stays.

    The build is requested by its full version (2.13.0+cpu). Other indexes do not have that version, so a machine
    without a GPU never gets the CUDA build by accident, and a change of build replaces the installed one.
    """
    venv = root / ".venv"
    pip = (str(interpreter(venv)), "-m", "pip", "install", "--no-input", "--disable-pip-version-check")
    steps = []
    if fresh:
        steps.append(Step("a new environment", ((sys.executable, "-m", "venv", str(venv)),), NO_VENV))
    if build != DEFAULT_INDEX:
        torch = (*pip, *torch_requirement(root, build))
        first = (*torch, "--index-url", index_of(build), "--retries", "2", "--timeout", "15")
        steps.append(Step(f"PyTorch {torch_pin(root)}+{build}", (first, torch), NO_TORCH))
    needs = DEV if dev else RUN
    steps.append(Step(needs, ((*pip, "-r", str(root / needs)),), NO_PACKAGES))
    return steps


def run_steps(steps: Sequence[Step], call: Call) -> None:
    """Run each step's commands until one succeeds; print when it is not the first. SetUpError if all fail."""
    for number, step in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] {step.title}", flush=True)
        for attempt, command in enumerate(step.commands):
            if attempt:
                print("  That did not work. Trying pip's default index.", flush=True)
            print("  " + render(command), flush=True)
            if call(command) == 0:
                break
        else:
            raise SetUpError(f"Set-up failed at: {step.title}. {step.remedy}")


def render(command: Sequence[str]) -> str:
    """A command as a user would type it."""
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


def set_up(root: Path, args: argparse.Namespace, call: Call) -> None:
    """Create or update `.venv`. SetUpError if that fails."""
    venv = root / ".venv"
    stamp = read_stamp(venv)
    build, why = choose_build(args.torch, stamp.torch if stamp and stamp.torch_asked else None)
    # Packages of an earlier --dev are kept up to date: a mix of old and new pins is worse than a larger environment.
    dev = args.dev or (stamp is not None and DEV in stamp.files)
    files = {name: fingerprint(root / name) for name in ([RUN, DEV] if dev else [RUN])}
    if stamp and (stamp.torch, stamp.files) == (build, files):
        print(f"{venv} is ready. {why}.")
        return
    print(why)
    steps = plan(root, build, dev=dev, fresh=stamp is None)
    if args.dry_run:
        print("\n".join(render(command) for step in steps for command in step.commands[:1]))
        return
    if stamp is None:
        remove_broken(venv)
        venv.mkdir()
    unfinished = venv / "set_up.unfinished"
    unfinished.write_text("set_up.py removes this file when it is done.\n", encoding="utf-8")
    try:
        run_steps(steps, call)
    except SetUpError:
        if stamp is not None:
            unfinished.unlink()  # pip keeps what it cannot replace, so the old environment still works
        raise
    asked = args.torch not in (None, "auto") or (args.torch is None and stamp is not None and stamp.torch_asked)
    done = Stamp(place=str(venv), torch=build, torch_asked=asked, files=files)
    (venv / "set_up.json").write_text(json.dumps(asdict(done), indent=2) + "\n", encoding="utf-8")
    unfinished.unlink()
    print(f"{venv} is ready.")


def call_program(command: Sequence[str]) -> int:
    """Run a command without input and return its exit status; 127 if it could not be started."""
    try:
        return subprocess.call(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"  {error}", file=sys.stderr)
        return 127


def main(argv: Sequence[str] | None = None, root: Path = ROOT, call: Call = call_program) -> int:
    """Read the command line, set up the environment, return the exit status."""
    parser = argparse.ArgumentParser(description="Create Dreamfolder's environment: .venv beside this file.")
    parser.add_argument("--dev", action="store_true", help="also install what the tests need (requirements-dev.txt)")
    parser.add_argument(
        "--torch",
        metavar="BUILD",
        help="build of PyTorch: auto (by the GPU that is found: NVIDIA, AMD, Intel, else CPU), cpu, cu130, rocm7.2, "
        f"xpu, … (a folder of {PYTORCH_INDEX}), rocm10.0.0 (from {AMD_INDEX}), or {DEFAULT_INDEX} (from pip's default "
        "index). Later set-ups keep this choice.",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands and stop")
    args = parser.parse_args(argv)
    try:
        set_up(root, args, call)
    except SetUpError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The next set-up starts from scratch.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
