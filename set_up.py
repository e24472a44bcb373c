"""Make the environment that Dreamfolder runs in: `.venv` beside this file, with PyTorch and requirements.txt.

Standard library only, so any Python from 3.11 on can start it. A second run does nothing again that is done; one that
was interrupted starts again from nothing. Exit status: 0 ready, 1 not made (the way out is printed), 2 wrong usage.
"""

import sys

# Before everything that an older Python would only answer with a SyntaxError or an ImportError.
if sys.version_info < (3, 11):
    sys.exit(
        "Dreamfolder needs Python 3.11 or newer; this is Python %d.%d (%s).\n"
        "Install one from https://www.python.org/downloads/ and name it, for example: python3.12 set_up.py\n"
        "(first_run.sh and run_tests.sh take it from PYTHON: PYTHON=python3.12 ./first_run.sh)"
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
CPU, CUDA = "cpu", "cu130"
OWN_INDEX = "default"  # no build is named: whatever torch pip's own index offers
OLDEST_DRIVER = 580  # the first driver branch that runs CUDA 13 (NVIDIA's CUDA compatibility table)

NO_VENV = (
    "Python could not make an environment. On Debian and Ubuntu that part of Python is a package of its own: "
    "sudo apt install python3-venv"
)
NO_TORCH = (
    "Neither PyTorch's index nor pip's own gave that build for this Python and system. Is the network there? "
    f"Other builds: --torch cpu, --torch cu126, … (the folders of {PYTORCH_INDEX}); --torch {OWN_INDEX} takes what "
    "pip's own index offers (on Linux that is CUDA's, several GB)."
)
NO_PACKAGES = "pip's last lines say why. What was downloaded is kept in its cache for the next time."

Call = Callable[[Sequence[str]], int]


class SetUpError(Exception):
    """The environment could not be made; the text says what to do."""


@dataclass(frozen=True)
class Step:
    """One thing to do: the commands are tried in order until one succeeds."""

    title: str
    commands: tuple[tuple[str, ...], ...]
    way_out: str


@dataclass(frozen=True)
class Stamp:
    """What a finished set-up leaves in the environment, so that the next one knows what is done."""

    place: str  # an environment that was moved has wrong paths inside
    torch: str
    torch_asked: bool  # by --torch: later set-ups keep it
    files: dict[str, str]  # requirement file -> fingerprint


# ------------------------------------------------------------------ which build of PyTorch


def nvidia_smi(*arguments: str) -> tuple[int, str]:
    """(exit status, what it printed); 127 and the reason when it is not there or does not end."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 127, "nvidia-smi is not on PATH"
    try:
        answer = subprocess.run([program, *arguments], capture_output=True, stdin=subprocess.DEVNULL, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, f"{program} did not run: {error}"
    return answer.returncode, (answer.stdout + answer.stderr).decode("utf-8", errors="replace").strip()


def choose_build(asked: str | None, kept: str | None) -> tuple[str, str]:
    """(build of PyTorch, why). `asked` is --torch; `kept` is what it said when the environment was made."""
    if asked not in (None, "auto"):
        return asked, f"PyTorch build {asked}, as --torch says"
    if asked is None and kept is not None:
        return kept, f"PyTorch build {kept}, as --torch said when the environment was made"
    if sys.platform == "darwin":
        return OWN_INDEX, "PyTorch's build for macOS"
    status, said = nvidia_smi("-L")
    cards = re.findall(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", said, re.MULTILINE)
    if status != 0 or not cards:
        why = said.splitlines()[0] if said else "nvidia-smi lists none"
        return CPU, f"No NVIDIA card answers ({why}): PyTorch's CPU build"
    return CUDA, f"NVIDIA card {', '.join(cards)}: PyTorch's CUDA build {CUDA}{driver_note()}"


def driver_note() -> str:
    """A line for whoever's NVIDIA driver is too old for the CUDA build, else nothing."""
    status, said = nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    driver = re.match(r"(\d+)\.", said)
    if status != 0 or driver is None or int(driver[1]) >= OLDEST_DRIVER:
        return ""
    return (
        f"\n  Its driver ({said.splitlines()[0]}) is older than that build needs ({OLDEST_DRIVER}): "
        "update the driver, or name an older CUDA build with --torch."
    )


# ------------------------------------------------------------------ what is there already


def interpreter(venv: Path) -> Path:
    """The Python of an environment."""
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def fingerprint(requirements: Path) -> str:
    """Hash of a requirement file's lines: the same whichever line ends git wrote."""
    lines = requirements.read_text(encoding="utf-8").splitlines()
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_stamp(venv: Path) -> Stamp | None:
    """What the last set-up wrote down; None when it did not finish, or the environment was moved or lost its Python."""
    try:
        stamp = Stamp(**json.loads((venv / "set_up.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    whole = stamp.place == str(venv) and interpreter(venv).exists() and not (venv / "set_up.unfinished").exists()
    return stamp if whole else None


def clear_away(venv: Path) -> None:
    """Remove an unfinished, moved or broken environment of ours; one that somebody else made is theirs to remove."""
    if not venv.exists():
        return
    if not (venv / "set_up.unfinished").exists() and not (venv / "set_up.json").exists():
        raise SetUpError(f"{venv} is there, but set_up.py did not make it. Rename or remove it, then start again.")
    if Path(sys.prefix).resolve() == venv.resolve():
        raise SetUpError(f"{venv} must be made anew, which its own Python cannot do. Start set_up.py with another one.")
    print(f"{venv} is unfinished, moved or broken: making it anew.")
    shutil.rmtree(venv)


# ------------------------------------------------------------------ what to do


def torch_pin(root: Path) -> str:
    """The version of PyTorch that requirements.txt pins."""
    pin = re.search(r"^torch==([\w.]+)", (root / RUN).read_text(encoding="utf-8"), re.MULTILINE)
    if pin is None:
        raise SetUpError(f"{root / RUN} does not pin torch (torch==…).")
    return pin[1]


def plan(root: Path, build: str, *, dev: bool, fresh: bool) -> list[Step]:
    """The steps, in order. PyTorch goes first: requirements.txt then finds its pin met and leaves the build alone.

    The build is asked for by its full version (2.13.0+cpu). Other indexes do not have that name, so a machine without
    a card never gets the CUDA build by accident, and a change of build replaces the one that is there.
    """
    venv = root / ".venv"
    pip = (str(interpreter(venv)), "-m", "pip", "install", "--no-input", "--disable-pip-version-check")
    steps = []
    if fresh:
        steps.append(Step("a new environment", ((sys.executable, "-m", "venv", str(venv)),), NO_VENV))
    if build != OWN_INDEX:
        torch = (*pip, "--no-deps", f"torch=={torch_pin(root)}+{build}")
        first = (*torch, "--index-url", PYTORCH_INDEX + build, "--retries", "2", "--timeout", "15")
        steps.append(Step(f"PyTorch {torch_pin(root)}+{build}", (first, torch), NO_TORCH))
    needs = DEV if dev else RUN
    steps.append(Step(needs, ((*pip, "-r", str(root / needs)),), NO_PACKAGES))
    return steps


def carry_out(steps: Sequence[Step], call: Call) -> None:
    """Run each step's commands until one succeeds; say aloud when it is not the first. SetUpError when none does."""
    for number, step in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] {step.title}", flush=True)
        for attempt, command in enumerate(step.commands):
            if attempt:
                print("  That did not work. Trying the index that this machine's pip is set to.", flush=True)
            print("  " + render(command), flush=True)
            if call(command) == 0:
                break
        else:
            raise SetUpError(f"Set-up stopped at: {step.title}. {step.way_out}")


def render(command: Sequence[str]) -> str:
    """A command as a user would type it."""
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


def make(root: Path, args: argparse.Namespace, call: Call) -> None:
    """Bring `.venv` to what was asked for, or raise SetUpError."""
    venv = root / ".venv"
    stamp = read_stamp(venv)
    build, why = choose_build(args.torch, stamp.torch if stamp and stamp.torch_asked else None)
    # What --dev brought stays, and stays current: an environment half of old pins is worse than a larger one.
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
        clear_away(venv)
        venv.mkdir()
    unfinished = venv / "set_up.unfinished"
    unfinished.write_text("set_up.py removes this file when it is done.\n", encoding="utf-8")
    try:
        carry_out(steps, call)
    except SetUpError:
        if stamp is not None:
            unfinished.unlink()  # pip leaves what it cannot replace as it was: still the environment of before
        raise
    asked = args.torch not in (None, "auto") or (args.torch is None and stamp is not None and stamp.torch_asked)
    done = Stamp(place=str(venv), torch=build, torch_asked=asked, files=files)
    (venv / "set_up.json").write_text(json.dumps(asdict(done), indent=2) + "\n", encoding="utf-8")
    unfinished.unlink()
    print(f"{venv} is ready.")


def call_program(command: Sequence[str]) -> int:
    """Run a command with this program's output and no input; its exit status (127: it could not be started)."""
    try:
        return subprocess.call(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"  {error}", file=sys.stderr)
        return 127


def main(argv: Sequence[str] | None = None, root: Path = ROOT, call: Call = call_program) -> int:
    """Read the command line, make the environment, return the exit status."""
    parser = argparse.ArgumentParser(description="Make Dreamfolder's environment: .venv beside this file.")
    parser.add_argument("--dev", action="store_true", help="also install what the tests need (requirements-dev.txt)")
    parser.add_argument(
        "--torch",
        metavar="BUILD",
        help="PyTorch's build: auto (CUDA if an NVIDIA card answers, else CPU), cpu, cu130, … (a folder of "
        f"{PYTORCH_INDEX}), or {OWN_INDEX} (from pip's own index). Later set-ups keep what is named here.",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands and stop")
    args = parser.parse_args(argv)
    try:
        make(root, args, call)
    except SetUpError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The next set-up starts again from nothing.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
