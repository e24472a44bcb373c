"""Freed memory is kept, and memory is preallocated, with glibc; nothing happens elsewhere."""

from __future__ import annotations

import subprocess
import sys

import pytest

from library.runtime import allocator

COUNT_FAULTS = """
import resource, time
from library.runtime import allocator

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        bytearray(b"x") * (1 << 26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""
KEPT = """
print(allocator.keep_freed_memory())
faults(2)
print(faults(4))
"""
AHEAD = """
print(allocator.keep_freed_memory())
with allocator.preallocate_heap(1 << 28):
    for thread in allocator.threading.enumerate():
        if thread.name == allocator.THREAD:
            thread.join()
print(faults(1))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only the GNU C library is told")
@pytest.mark.parametrize("what", [KEPT, AHEAD], ids=["kept memory", "preallocated memory"])
def test_it_costs_no_page_faults(what: str) -> None:
    """64 MiB are 16384 pages of 4 KiB each time; in its own process, because the setting lasts until it ends."""
    command = [sys.executable, "-c", COUNT_FAULTS + what]
    done, faults = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.split()
    if done == "False":
        pytest.skip("another C library")
    assert int(faults) < 1000


def test_nothing_is_taken_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "keep_freed_memory", None)
    with allocator.preallocate_heap(0):
        pass


SURVIVORS = """
from library.runtime import allocator
for size in (1 << 62, 1 << 40, 1 << 29):
    try:
        with allocator.preallocate_heap(size):
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
print(allocator.threading.active_count())
"""


def test_what_there_is_not_is_not_taken_and_a_failure_inside_ends_it() -> None:
    """In its own process, which keeps the memory."""
    done = subprocess.run([sys.executable, "-c", SURVIVORS], check=True, capture_output=True, encoding="utf-8")
    assert done.stdout.split() == ["1"]


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for system in ("win32", "darwin"):
        monkeypatch.setattr(sys, "platform", system)
        assert allocator.keep_freed_memory() is False


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert allocator.keep_freed_memory() is False
