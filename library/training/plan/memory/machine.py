"""The machine that a run is planned for, which need not be this one."""

from __future__ import annotations

from dataclasses import replace

from library.runtime.device import Machine, describe_machine


def planned_machine(*, cpu: bool = False) -> Machine:
    """This machine if it has a graphics card, else one with a CUDA card that knows bf16; with `cpu` without a card."""
    here = describe_machine()
    if cpu:
        return replace(here, kind="cpu", name="CPU", memory_bytes=None, compute_capability=None)
    if not here.is_cpu:
        return here
    return replace(here, kind="cuda", name="a CUDA card with bf16 (none is here)", compute_capability=(8, 6))
