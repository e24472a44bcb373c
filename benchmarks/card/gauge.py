"""The device that a process measures on: its clock, its memory, its name. Without a graphics card, the CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Peak:
    """The most memory so far, in bytes: tensors, and what torch's allocator took for them; None: not known."""

    allocated: int | None = None
    reserved: int | None = None

    def most(self, other: Peak) -> Peak:
        """The larger of both."""
        return Peak(_larger(self.allocated, other.allocated), _larger(self.reserved, other.reserved))


def _larger(one: int | None, other: int | None) -> int | None:
    known = [value for value in (one, other) if value is not None]
    return max(known) if known else None


class Gauge:
    """Measures on one device. `module` is torch.cuda, torch.xpu or that of another backend; None: the CPU."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self.device = device
        self.module: Any = None if device.type == "cpu" else torch.get_device_module(device.type)

    def now(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.module is not None:
            self.module.synchronize()
        return time.perf_counter()

    def peak(self) -> Peak:
        """The most memory since the start, or since `reset_peak`; of the CPU the most memory of the process so far."""
        if self.module is None:
            return Peak(_process_peak())
        return Peak(self._ask("max_memory_allocated"), self._ask("max_memory_reserved"))

    def allocated(self) -> int:
        """Bytes of tensors now; 0 if unknown."""
        return (self._ask("memory_allocated") if self.module is not None else None) or 0

    def reset_peak(self) -> None:
        """Begin anew; on the CPU that is not possible."""
        if hasattr(self.module, "reset_peak_memory_stats"):
            self.module.reset_peak_memory_stats()

    def free(self) -> None:
        """Return freed memory to the system."""
        import gc

        gc.unfreeze()  # what was alive when a run imported its packages is never collected otherwise
        gc.collect()
        if hasattr(self.module, "empty_cache"):
            self.module.empty_cache()

    def _ask(self, name: str) -> int | None:
        function = getattr(self.module, name, None)
        return None if function is None else int(function())


def _process_peak() -> int | None:
    """The most main memory of this process so far, in bytes; None under Windows."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def best_device() -> torch.device:
    """The device that a run takes: the first graphics card that torch can use, else the CPU."""
    import torch

    if torch.accelerator.is_available():
        return torch.device(torch.accelerator.current_accelerator() or "cpu")
    return torch.device("cpu")


@contextmanager
def chosen_device(words: Sequence[str]) -> Iterator[None]:
    """The pretend device of the tests, if `words` ask for it: it takes the place of a card."""
    if "--pretend" not in words:
        yield
        return
    from tests.pretend_device.device import chosen

    with chosen():
        yield
