"""Memory taken ahead is there for what comes later, and a failure does not wait for it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from library.runtime import reserve
from library.runtime.reserve import memory_taken_ahead

COUNT_FAULTS = """
import resource
import torch
from library.runtime.allocator import keep_freed_memory
from library.runtime.reserve import memory_taken_ahead

def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(keep_freed_memory())
faults(1 << 20)
with memory_taken_ahead(1 << 27):
    pass
print(faults(1 << 26))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only the GNU C library keeps freed memory")
def test_what_is_allocated_later_costs_no_page_faults() -> None:
    """64 MiB are 16384 pages of 4 KiB; in a process of its own, since memory is kept to the process's end."""
    out = subprocess.run([sys.executable, "-c", COUNT_FAULTS], check=True, capture_output=True, encoding="utf-8").stdout
    kept, faults = out.split()
    if kept == "False":
        pytest.skip("another C library")
    assert int(faults) < 1000


def test_nothing_is_taken_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", None)
    with memory_taken_ahead(0):
        pass


def test_a_failure_inside_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reserve, "PIECE", 4096)
    with pytest.raises(ZeroDivisionError), memory_taken_ahead(2**30):
        raise ZeroDivisionError


def test_more_than_there_is_is_refused_as_torch_does() -> None:
    with pytest.raises(RuntimeError, match="alloc"), memory_taken_ahead(2**62):
        pass
