"""Call the tools that fill caches, as users do and in this process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
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


def kill_when(process: subprocess.Popen[str], begun: Callable[[], bool]) -> None:
    """Kill -9 as soon as it has begun to write."""
    until = time.monotonic() + 100
    while not begun():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode != 0
