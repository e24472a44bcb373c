"""Call the tools that fill caches, as users do and in this process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.training.running import World

ROOT = Path(__file__).resolve().parents[2]


def flags(world: World, folder: Path, **more: object) -> list[str]:
    """The flags of a training on the images in `folder`, without an --output_dir. What is remembered lies there."""
    words = world.arguments(
        folder / "out", train_data_dir=folder, data_cache_dir=folder / "remembered", output_name=None, **more
    )
    return [word for word in words if not word.startswith("--output_dir")]


def start(tool: str, words: list[str], **environment: str) -> subprocess.Popen[str]:
    """The tool as a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / tool), *words],
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def finished(process: subprocess.Popen[str]) -> str:
    """What the process printed, once it has ended well."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


# Runs a program until it has brought so many files into their places; then every thread that brings another waits.
_UNTIL = """
import os, runpy, sys, threading
ending, count, *sys.argv = sys.argv[1:]
place, placed = os.replace, []

def counting(source, target, **more):
    place(source, target, **more)
    if os.fspath(target).endswith(ending):
        placed.append(target)
        if len(placed) >= int(count):
            print("enough", flush=True)
            threading.Event().wait()

os.replace = counting
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def kill_after(count: int, ending: str, script: Path, words: list[str]) -> None:
    """Run a program and kill -9 it when it has written so many files with this ending of their names, however fast."""
    process = subprocess.Popen(
        [sys.executable, "-c", _UNTIL, ending, str(count), str(script), *words],
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert process.stdout is not None
    said = []
    with process.stdout:
        for line in process.stdout:
            said.append(line)
            if line.endswith("enough\n"):  # after what a progress bar has left of its line
                process.kill()
                break
    assert process.wait() != 0 and said[-1].endswith("enough\n"), "".join(said)
