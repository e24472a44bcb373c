"""Describe the machine, the package versions and the date, for the line above every table of results."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "diffusers", "transformers", "accelerate")


def describe() -> str:
    """Processor, cores, memory, system, Python, versions of the packages and today's date, in one line."""
    return ", ".join(
        [
            f"{processor()} with {os.cpu_count()} cores",
            f"{memory_gib():.0f} GiB of memory",
            f"{platform.system()} {platform.machine()}",
            f"Python {platform.python_version()}",
            *(f"{name} {installed(name)}" for name in PACKAGES),
            date.today().isoformat(),
        ]
    )


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    pairs = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {name.strip(): value.strip() for name, value in pairs.items()}
    generation = f" (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else ""
    return facts.get("model name", platform.machine()) + generation


def memory_gib() -> float:
    """Main memory in GiB; 0 if unknown."""
    if not hasattr(os, "sysconf"):
        return 0.0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def installed(package: str) -> str:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(describe())
