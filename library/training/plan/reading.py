"""Plan after how many steps their losses are read from the device (--loss_read_interval). No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.training.optim.optimizers import has_fused_kernel

if TYPE_CHECKING:
    from library.training.adapter.plan import AdapterPlan
    from library.training.optim.optimizers import OptimizerChoice
    from library.training.plan.facts import RunFacts
    from library.training.update.plan import UpdatePlan

ON_A_CARD = 10  # steps: a fraction of a second to seconds, and the device waits in one of ten


def decide_read_interval(
    facts: RunFacts, optimizer: OptimizerChoice, update: UpdatePlan, adapter: AdapterPlan | None, notes: list[str]
) -> int:
    """After how many steps losses are read: as asked for, else ON_A_CARD, on the CPU 1. A step whose loss is read later
    must be one that the device can leave out by itself; where it cannot, each is read at once, and a note says why."""
    asked = facts.options.run.loss_read_interval
    interval = asked or (1 if facts.machine.is_cpu else ON_A_CARD)
    why = _must_be_read_at_once(facts, optimizer, update, adapter)
    if interval == 1 or why is None:
        return interval
    if asked is not None:
        notes.append(f"--loss_read_interval {asked}: the loss is read after each step, as {why}")
    return 1


def _must_be_read_at_once(
    facts: RunFacts, optimizer: OptimizerChoice, update: UpdatePlan, adapter: AdapterPlan | None
) -> str | None:
    """Why the loss of a step has to be known before its weights are updated; None: it has not."""
    if facts.precision.uses_scaler:
        return "the loss scale of fp16 depends on it"
    if not has_fused_kernel(optimizer):
        return f"the optimizer {optimizer.name} cannot leave out a step by itself whose loss is not finite"
    if update.fuses or update.offloads or update.rounding is not None:
        return "weights are updated part by part"
    if facts.sharding is not None or facts.zero is not None:
        return "the weights are shared out over processes"
    if adapter is not None and adapter.settings is None:
        return f"{adapter.module} may count steps itself"
    if facts.options.adapter.scale_weight_norms is not None:
        return "--scale_weight_norms changes the weights after it"
    return None
