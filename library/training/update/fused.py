"""A backward pass that updates each weight as soon as its gradient is complete, and frees the gradient (LOMO, arXiv
2306.09782): never are the gradients of all weights there at once.

A weight is updated when nothing in the pass needs it any more: torch calls the hook of a parameter after the last use
of it was back-propagated, also under (non-reentrant) gradient checkpointing. So the result is that of a step with all
gradients, bit for bit.

What depends on all gradients must be known before the first weight changes: the global norm that they are clipped by,
or whether to skip a step. Then the graph is back-propagated twice; the first pass measures and frees the gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from library.training.backward import Backward, WholeBackward
from library.training.optim.clipping import clip_gradients, joined_norm, norms_of, scale_gradients
from library.training.update.plan import AT_ONCE, UpdatePlan
from library.training.update.stepping import Stepping

if TYPE_CHECKING:
    from accelerate import Accelerator


class Collected(Protocol):
    """Parameters whose gradients are complete, until they are updated together."""

    def begin(self) -> None:
        """A backward pass begins."""

    def add(self, parameter: nn.Parameter) -> Sequence[nn.Parameter]:
        """Add one. Returns those to update now."""

    def rest(self) -> Sequence[nn.Parameter]:
        """Those that are left at the end of the pass."""


@dataclass
class BySize:
    """As many as are stepped at once: updating each alone would cost more time and save hardly more memory."""

    _held: list[nn.Parameter] = field(default_factory=list)
    _values: int = 0

    def begin(self) -> None:
        """Hold none."""
        self._held, self._values = [], 0

    def add(self, parameter: nn.Parameter) -> Sequence[nn.Parameter]:
        """Add one."""
        self._held.append(parameter)
        self._values += parameter.numel()
        return self.rest() if self._values >= AT_ONCE else ()

    def rest(self) -> Sequence[nn.Parameter]:
        """All that are held."""
        held = self._held
        self.begin()
        return held


@dataclass
class ByGroup:
    """In `number` groups of about the same size, in the order of the optimizer (--fused_optimizer_groups): a group is
    updated when all of its gradients are complete."""

    parameters: Sequence[nn.Parameter]
    number: int
    _group: dict[nn.Parameter, int] = field(default_factory=dict, init=False)
    _held: list[list[nn.Parameter]] = field(default_factory=list, init=False)
    _missing: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        size = -(-sum(parameter.numel() for parameter in self.parameters) // self.number)
        before = 0
        for parameter in self.parameters:
            self._group[parameter] = before // size
            before += parameter.numel()

    def begin(self) -> None:
        """Hold none, and wait for all that are trained."""
        self._held = [[] for _ in range(self.number)]
        self._missing = [0] * self.number
        for parameter, group in self._group.items():
            self._missing[group] += parameter.requires_grad

    def add(self, parameter: nn.Parameter) -> Sequence[nn.Parameter]:
        """Add one."""
        group = self._group[parameter]
        self._held[group].append(parameter)
        self._missing[group] -= 1
        return self._taken(group) if self._missing[group] == 0 else ()

    def rest(self) -> Sequence[nn.Parameter]:
        """All that are held: of groups with parameters that this batch did not use."""
        return [parameter for group in range(self.number) for parameter in self._taken(group)]

    def _taken(self, group: int) -> Sequence[nn.Parameter]:
        held, self._held[group] = self._held[group], []
        return held


@dataclass
class FusedBackward:
    """The backward pass of a step of one batch, fused with the update. See Backward for the calls.

    `optimizer`: accelerate's; the loop calls its `step` afterwards, for what an optimizer counts. `limit`: the norm to
    clip to, of all gradients together or, `by_tensor`, of each (as sd-scripts does it); 0: none.
    """

    accelerator: Accelerator
    optimizer: Any
    stepping: Stepping
    collected: Collected
    limit: float
    two_passes: bool
    by_tensor: bool = False
    _loss: Tensor | None = field(default=None, init=False)
    _parameters: Sequence[nn.Parameter] = field(default=(), init=False)
    _factor: float = field(default=1.0, init=False)
    _norm: Tensor | None = field(default=None, init=False)
    _norms: dict[nn.Parameter, Tensor] = field(default_factory=dict, init=False)
    _receive: Callable[[nn.Parameter], None] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        # a hook that holds what holds its parameter would keep both for good: Python cannot see through torch's hooks
        known = weakref.ref(self)

        def arrived(parameter: nn.Parameter) -> None:
            if (backward := known()) is not None:
                backward._arrived(parameter)

        parameters: Any = self.stepping.parameters
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(arrived)

    def add(self, loss: Tensor) -> None:
        """Note the loss of the batch. Raises RuntimeError for a second batch of a step."""
        if self._loss is not None:
            raise RuntimeError("a fused backward pass has one batch per step")
        self._loss = loss

    def measure(self, parameters: Sequence[nn.Parameter]) -> Tensor | None:
        """The norm, by a backward pass of its own; None with one pass."""
        self._parameters, self._factor = parameters, 1.0
        if not self.two_passes:
            return None
        self._back_propagate(self._measured, retain_graph=True)
        return self._joined()

    def finish(self, norm: Tensor | None, factor: float) -> bool:
        """Back-propagate, and update all weights meanwhile. With one pass, whether all gradients were finite is known
        only then."""
        self._factor = factor
        self._norm = None if self.by_tensor or norm is None else norm * factor
        self.collected.begin()
        self._back_propagate(self._collect)
        self._update(self.collected.rest())
        self._loss = None
        joined = self._joined()
        return joined is None or bool(joined.isfinite())

    def clear(self) -> None:
        """Drop the graph and all gradients."""
        self._loss, self._parameters = None, ()
        self.optimizer.zero_grad(set_to_none=True)

    def _back_propagate(self, receive: Callable[[nn.Parameter], None], **how: Any) -> None:
        self._receive = receive
        try:
            self.accelerator.backward(self._loss, **how)
        finally:
            self._receive = None

    def _arrived(self, parameter: nn.Parameter) -> None:
        """The gradient of a parameter is complete. Backward passes of others are left alone."""
        if self._receive is not None:
            scale_gradients((parameter,), self._factor)
            self._receive(parameter)

    def _measured(self, parameter: nn.Parameter) -> None:
        self._note_norm(parameter)
        parameter.grad = None

    def _collect(self, parameter: nn.Parameter) -> None:
        if not self.two_passes:
            self._note_norm(parameter)
        self._update(self.collected.add(parameter))

    def _note_norm(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            self._norms[parameter] = norms_of(parameter.grad)

    def _update(self, parameters: Sequence[nn.Parameter]) -> None:
        if not parameters:
            return
        if self.limit > 0:
            for part in ([parameter] for parameter in parameters) if self.by_tensor else (parameters,):
                clip_gradients(part, self.limit, self._norm)
        self.stepping.step(parameters)

    def _joined(self) -> Tensor | None:
        """The global norm of what was measured, in the order of a step with all gradients, bit for bit."""
        norms = [self._norms[parameter] for parameter in self._parameters if parameter in self._norms]
        self._norms.clear()
        return joined_norm(norms) if norms else None


def build_backward(accelerator: Accelerator, optimizer: Any, stepping: Stepping, plan: UpdatePlan) -> Backward:
    """The backward pass of a run. `optimizer`: accelerate's."""
    if not plan.fuses:
        return WholeBackward(accelerator, optimizer, plan.max_grad_norm)
    return FusedBackward(
        accelerator,
        optimizer,
        stepping,
        ByGroup(stepping.parameters, plan.groups) if plan.groups else BySize(),
        plan.max_grad_norm,
        two_passes=plan.two_passes,
        by_tensor=plan.clips_by_tensor,
    )
