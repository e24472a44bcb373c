"""What a run asks of its device, whichever it is: random states and memory.

torch has one module for each kind of device (torch.cuda, torch.xpu, torch.mps), and not every one has every function.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def accelerator_module() -> Any | None:
    """torch's module of the accelerator that there is; None on a CPU."""
    if not torch.accelerator.is_available():
        return None
    module: Any = torch.get_device_module(torch.accelerator.current_accelerator())
    return module


def release_cached() -> None:
    """Give the memory that torch keeps for later back to the device."""
    module = accelerator_module()
    if module is not None and getattr(module, "is_initialized", lambda: True)():
        module.empty_cache()


def bytes_in_use(device: torch.device) -> int | None:
    """Bytes of the tensors on a device; None on a CPU."""
    if device.type == "cpu":
        return None
    module: Any = torch.get_device_module(device)
    count = getattr(module, "memory_allocated", None) or module.current_allocated_memory
    return int(count())


def peak_bytes(device: torch.device) -> int | None:
    """The most bytes of tensors that a device had at once; None where nothing counts them."""
    count: Any = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return None if device.type == "cpu" or count is None else int(count())


def random_states() -> list[Tensor]:
    """The states of torch's own generators on all devices of the accelerator; none on a CPU."""
    module = accelerator_module()
    if module is None:
        return []
    every = getattr(module, "get_rng_state_all", None)  # Apple has one device, and no such function
    return list(every()) if every is not None else [module.get_rng_state()]


def set_random_states(states: Sequence[Tensor]) -> None:
    """Set what `random_states` gave."""
    module = accelerator_module()
    if module is None or not states:
        return
    every = getattr(module, "set_rng_state_all", None)
    if every is not None:
        every(list(states))
    else:
        module.set_rng_state(states[0])


@contextmanager
def forked_generators() -> Iterator[None]:
    """What is drawn from the global generators of torch while this is open, on the CPU or the current device, leaves no
    trace in them."""
    module = accelerator_module()
    before = torch.get_rng_state(), None if module is None else module.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        if module is not None:
            module.set_rng_state(before[1])


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch on the CPU and the current device. torch.manual_seed asks every kind of
    device that torch knows, which takes longer than drawing the noise of a step."""
    torch.default_generator.manual_seed(seed)
    module = accelerator_module()
    if module is not None:
        module.manual_seed(seed)
