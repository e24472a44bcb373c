"""Freed memory is kept where the C library can be told to, and nothing happens elsewhere."""

from __future__ import annotations

import subprocess
import sys

import pytest

from library.runtime import allocator

COUNT_FAULTS = """
import resource
from library.runtime.allocator import keep_freed_memory
print(keep_freed_memory())
for _ in range(2):
    bytearray(b"x") * (1 << 26)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    bytearray(b"x") * (1 << 26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only the GNU C library is told")
def test_memory_taken_again_costs_no_page_faults() -> None:
    """64 MiB are 16384 pages of 4 KiB each time; in a process of its own, since it holds to the process's end."""
    out = subprocess.run([sys.executable, "-c", COUNT_FAULTS], check=True, capture_output=True, encoding="utf-8").stdout
    done, faults = out.split()
    if done == "False":
        pytest.skip("another C library")
    assert int(faults) < 1000


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for system in ("win32", "darwin"):
        monkeypatch.setattr(sys, "platform", system)
        assert allocator.keep_freed_memory() is False


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert allocator.keep_freed_memory() is False
