"""Decide how the optimizer changes the weights, and refuse what has no meaning then. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast

from library.messages import counted
from library.options.mistakes import Mistakes
from library.training.optim.optimizer_table import OPTIMIZERS, OptimizerRow
from library.training.optim.optimizers import is_same_class

if TYPE_CHECKING:
    from library.training.optim.optimizers import OptimizerChoice
    from library.training.plan.costs import Costs
    from library.training.plan.facts import RunFacts

AT_ONCE = 2**23
"""Values that are stepped at once: enough to keep a device busy, few enough for what is copied meanwhile."""


@dataclass(frozen=True)
class UpdatePlan:
    """`max_grad_norm`: what gradients are clipped to; 0: they are not. `fuses`: weights are updated during the backward
    pass, in `groups` groups (0: each as soon as it can be), with `two_passes` where all gradients must be known before;
    `clips_by_tensor`: each gradient by its own norm. `rounding`: of bfloat16 weights stepped as float32; None: the
    weights are stepped as they are. `offloads`: the optimizer's state is in main memory. `per_tensor`: see
    OptimizerRow. `casts_state`: its state has the format of the weights."""

    max_grad_norm: float = 0.0
    fuses: bool = False
    groups: int = 0
    two_passes: bool = False
    clips_by_tensor: bool = False
    rounding: Literal["stochastic", "kahan"] | None = None
    offloads: bool = False
    per_tensor: bool = True
    casts_state: bool = False

    @property
    def extra_state(self) -> int:
        """Bytes of state for each trained parameter beside the optimizer's."""
        return 2 if self.rounding == "kahan" else 0

    def state_format(self, weight_bytes: int) -> int:
        """Bytes of a number in optimizer state that has the format of the stepped weights."""
        return weight_bytes if self.rounding is None else 4

    def costs(self, whole: Costs, largest: int, weight_bytes: int) -> Costs:
        """The costs of a run on its device, made of those of one that does not fuse or offload. `largest`: values of
        the largest weight."""
        gradients = whole.gradients
        if self.fuses:
            held = AT_ONCE * weight_bytes if not self.groups else gradients // self.groups
            gradients = min(gradients, held + largest * weight_bytes)
        return replace(whole, gradients=gradients, optimizer=0 if self.offloads else whole.optimizer)

    def describe(self) -> Iterator[str]:
        """Lines for the plan."""
        if self.fuses:
            what = f"in {counted(self.groups, 'group')}" if self.groups else "as its gradient is complete"
            passes = "two backward passes: the norm of all gradients is needed before the first weight changes"
            if not self.two_passes:
                passes = "one backward pass: a gradient that is not finite ends the run, and nothing is saved after it"
            yield f"fused backward pass: each weight is updated {what}, which frees its gradient; {passes}"
            if self.clips_by_tensor:
                yield "each tensor's gradient is clipped by its own norm, which changes its share in the step"
        if self.rounding is not None:
            how = "stochastically" if self.rounding == "stochastic" else "with Kahan summation"
            whole = "" if self.per_tensor else "; all weights at once, as float32 beside the bf16 ones during the step"
            yield f"bf16 weights: stepped in float32 and rounded {how}{whole}"
        if self.offloads:
            yield "optimizer state in main memory, on the device only during the step of its weights"


def decide_update(facts: RunFacts, optimizer: OptimizerChoice, mistakes: Mistakes, notes: list[str]) -> UpdatePlan:
    """The update of a run, with what it refuses added to `mistakes`."""
    limit, skips = facts.options.optimizer.max_grad_norm, facts.options.run.max_nonfinite_steps
    memory, precision = facts.options.memory, facts.precision
    by_tensor = memory.fused_backward_clipping == "tensor" and limit > 0
    rounding = memory.bf16_rounding if precision.trained == "bf16" else "nearest"
    fuses = _fuses(facts, optimizer, mistakes, notes)
    two_passes = fuses and ((limit > 0 and not by_tensor) or skips > 0)
    if two_passes and memory.gradient_checkpointing and memory.gradient_checkpointing_policy == "attention":
        mistakes.add(
            "--gradient_checkpointing_policy attention with a fused backward pass: there are two, for --max_grad_norm "
            "or --max_nonfinite_steps, and torch back-propagates such blocks once",
            "use --gradient_checkpointing_policy all or half, or --max_grad_norm 0 --max_nonfinite_steps 0",
        )
    return UpdatePlan(
        max_grad_norm=limit,
        fuses=fuses,
        groups=memory.fused_optimizer_groups or 0 if fuses else 0,
        two_passes=two_passes,
        clips_by_tensor=fuses and by_tensor,
        rounding=None if rounding == "nearest" else cast(Literal["stochastic", "kahan"], rounding),
        offloads=_offloads(facts, optimizer, mistakes, notes),
        per_tensor=optimizer.row.per_tensor,
        casts_state=optimizer.row.state_tensors > 0 and is_known(optimizer.row),
    )


def _fuses(facts: RunFacts, optimizer: OptimizerChoice, mistakes: Mistakes, notes: list[str]) -> bool:
    memory = facts.options.memory
    if not (memory.fused_backward_pass or memory.fused_optimizer_groups):
        return False
    flag = "--fused_backward_pass"
    if memory.fused_optimizer_groups:
        flag = f"--fused_optimizer_groups {memory.fused_optimizer_groups}"
    _check_per_tensor(flag, optimizer, mistakes)
    if facts.precision.uses_scaler:
        mistakes.add(
            f"{flag} with --mixed_precision fp16: whether fp16 overflowed is known after all gradients",
            f"use --mixed_precision bf16, or remove {flag}",
        )
    if facts.launch.world > 1:
        mistakes.add(
            f"{flag} with {counted(facts.launch.world, 'process', 'processes')}: they average all gradients at once",
            f"remove {flag}, or start one process; accelerate launch --use_fsdp shares out gradients too",
        )
    if facts.window > 1:
        notes.append(
            f"{flag} has no effect: gradients of {facts.window} batches are accumulated, so all of them are kept "
            "(--gradient_accumulation_steps)"
        )
        return False
    return True


def _offloads(facts: RunFacts, optimizer: OptimizerChoice, mistakes: Mistakes, notes: list[str]) -> bool:
    if not facts.options.memory.offload_optimizer:
        return False
    _check_per_tensor("--offload_optimizer", optimizer, mistakes)
    if facts.sharding is not None or facts.zero is not None:
        what = "--offload_optimizer with FSDP or DeepSpeed, which share out the state"
        mistakes.add(what, "remove --offload_optimizer; DeepSpeed has --offload_optimizer_device cpu")
    if facts.machine.is_cpu:
        notes.append("--offload_optimizer has no effect on a CPU: everything is in main memory")
        return False
    if "Paged" in optimizer.row.path:
        notes.append(f"--offload_optimizer has no effect: {optimizer.name} moves its state to main memory itself")
        return False
    return True


def _check_per_tensor(flag: str, optimizer: OptimizerChoice, mistakes: Mistakes) -> None:
    if not optimizer.row.per_tensor:
        able = ", ".join(row.name for row in OPTIMIZERS if row.per_tensor)
        why = "is not known to step each weight by its own gradient alone"
        if optimizer.row.learning_rate_free:
            why = "estimates its learning rate from all gradients, so no weight can be updated before all are there"
        mistakes.add(f"{flag}: {optimizer.name} {why}", f"use one of {able}, or remove {flag.split()[0]}")


def is_known(row: OptimizerRow) -> bool:
    """Whether the table has this class, so that the format of its state is known."""
    return any(is_same_class(row.path, known.path) for known in OPTIMIZERS)
