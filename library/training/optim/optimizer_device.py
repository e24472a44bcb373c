"""Whether the device of a run has the kernels of its optimizer. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.runtime.abilities import has_bitsandbytes_optimizers, has_paged_memory

if TYPE_CHECKING:
    from library.options.mistakes import Mistakes
    from library.runtime.device import Machine
    from library.training.optim.optimizers import OptimizerChoice


def check_device(choice: OptimizerChoice, machine: Machine, mistakes: Mistakes, notes: list[str]) -> None:
    """Add a mistake for an optimizer of bitsandbytes that has no kernel for the device, a note for one that cannot page
    there."""
    if not choice.row.path.startswith("bitsandbytes."):
        return
    if not has_bitsandbytes_optimizers(machine):
        mistakes.add(
            f"--optimizer_type {choice.name}: bitsandbytes has no optimizer for {machine.name}",
            "use AdamW, or Adafactor, whose state is about as small",
        )
    elif "Paged" in choice.row.path and not has_paged_memory(machine):
        notes.append(f"--optimizer_type {choice.name}: paged memory was never tried on {machine.name}")
