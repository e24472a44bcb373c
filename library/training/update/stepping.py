"""An optimizer step taken with some parameters at a time.

The optimizer is shown only those parameters, in copies of its groups, and its own `step` does the rest: every formula,
schedule and state is the optimizer's. What a group counts besides (a number of steps, a sum of weights) is advanced
once, by the last call, which comes from the loop as in any run and finds no gradients left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.training.optim.optimizers import ExactState, allocate_state
from library.training.update.offload import OffloadedState, is_moved
from library.training.update.plan import AT_ONCE, UpdatePlan
from library.training.update.rounding import Kahan, Nearest, Rounding, Stochastic

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass
class Stepping:
    """How an optimizer steps: all parameters at once, unless weights are rounded (`rounding`: bfloat16 weights are
    stepped as float32) or its state is offloaded. `per_tensor`: a parameter's step depends on its own gradient only.
    `casts_state`: the optimizer's state has the format of the weights that it steps."""

    optimizer: Optimizer
    per_tensor: bool = True
    rounding: Rounding | None = None
    offloaded: OffloadedState | None = None
    casts_state: bool = False
    _places: dict[nn.Parameter, tuple[int, int]] = field(default_factory=dict, init=False)
    _is_inside: bool = field(default=False, init=False)
    _open: ExitStack = field(default_factory=ExitStack, init=False)

    def __post_init__(self) -> None:
        for index, group in enumerate(self.optimizer.param_groups):
            for parameter in group["params"]:
                self._places[parameter] = index, len(self._places)
        if self.rounding is not None or self.offloaded is not None:
            self.optimizer.register_step_pre_hook(self._before)
            self.optimizer.register_step_post_hook(self._after)

    def allocate(self) -> None:
        """Create the state that the first step would create, where that is known; not if it is offloaded."""
        if self.offloaded is None:
            allocate_state(self.optimizer, as_fp32=self.rounding is not None)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters of the optimizer, in its order."""
        return list(self._places)

    def step(self, parameters: Sequence[nn.Parameter]) -> None:
        """Step these parameters, and free their gradients."""
        for some in portions(parameters):
            self._step(some)
            for parameter in some:
                parameter.grad = None

    @torch.no_grad()
    def _step(self, parameters: Sequence[nn.Parameter]) -> None:
        was_inside, self._is_inside = self._is_inside, True
        try:
            with self._showing(parameters, self.rounding):
                self.optimizer.step()
        finally:
            self._is_inside = was_inside

    def _before(self, *_: Any) -> None:
        """Before a step of the loop: step what has gradients, in portions where that is the same."""
        if self._is_inside:
            return
        parameters = [parameter for parameter in self._places if parameter.grad is not None]
        if self.per_tensor:
            self.step(parameters)
        else:
            self._open.enter_context(self._showing(self.parameters, self.rounding, counts=True))

    def _after(self, *_: Any) -> None:
        if not self._is_inside:
            self._open.close()
            if self.rounding is not None:
                self.rounding.stepped()

    @contextmanager
    def _showing(
        self, parameters: Sequence[nn.Parameter], rounding: Rounding | None, *, counts: bool = False
    ) -> Iterator[None]:
        """While this is open, the optimizer has only these parameters, or what stands for them, and their state.
        `counts`: they are all, and what a group counts is kept."""
        groups = self.optimizer.param_groups
        shown: dict[int, list[nn.Parameter]] = {index: [] for index in range(len(groups))}
        with ExitStack() as stack:
            for parameter in parameters:
                if self.offloaded is not None and parameter.grad is not None:
                    self.offloaded.fetch(parameter)
                    stack.callback(self.offloaded.put_back, parameter)
                stand_in = stack.enter_context(self._stand_in(parameter, rounding))
                shown[self._places[parameter][0]].append(stand_in)
            narrow = [{**groups[index], "params": some} for index, some in shown.items() if some or counts]
            self.optimizer.param_groups = narrow
            try:
                yield
            finally:
                self.optimizer.param_groups = groups
                for group, counted in zip(groups, narrow, strict=True) if counts else ():
                    group.update({key: value for key, value in counted.items() if key != "params"})

    @contextmanager
    def _stand_in(self, parameter: nn.Parameter, rounding: Rounding | None) -> Iterator[nn.Parameter]:
        """The parameter to step: a bfloat16 one as float32, with its gradient and its state. It is rounded into the
        parameter, unless it has no gradient, and so was not stepped."""
        if rounding is None or parameter.dtype != torch.bfloat16:
            yield parameter
            return
        number, state = self._places[parameter][1], self.optimizer.state
        stand_in = nn.Parameter(rounding.widen(number, parameter))
        is_written = parameter.grad is not None or isinstance(rounding, Nearest)
        if parameter.grad is not None:
            stand_in.grad = parameter.grad.float()
            parameter.grad = None
        if parameter in state:
            state[stand_in] = state.pop(parameter)
        try:
            yield stand_in
        finally:
            if stand_in in state:
                state[parameter] = state.pop(stand_in)
        stand_in.grad = None
        if is_written:
            with torch.no_grad():
                rounding.write(number, stand_in.detach(), parameter)

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """While this is open, a schedule-free optimizer may exchange the weights for their average: in float32, rounded
        to the nearest."""
        with self._showing(self.parameters, self.rounding and Nearest(), counts=True):
            yield

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer, and under "update" that of the rounding."""
        if self.offloaded is not None:
            self.offloaded.wait()
        state = ExactState(self.optimizer).state_dict()
        return state if self.rounding is None else {**state, "update": self.rounding.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state_dict(), bit for bit, of a run that rounds and offloads or does not."""
        saved = {key: value for key, value in state.items() if key != "update"}
        if self.rounding is not None:
            self.rounding.load_state_dict(state.get("update", {}))
        offloaded = self.offloaded
        if offloaded is None:
            ExactState(self.optimizer).load_state_dict(saved)
        else:
            numbers = chain.from_iterable(group["params"] for group in saved["param_groups"])
            pairs = zip(numbers, self.parameters, strict=True)
            read = {parameter: saved["state"].get(number, {}) for number, parameter in pairs}
            small = {
                number: {key: value for key, value in content.items() if not is_moved(value)}
                for number, content in saved["state"].items()
            }
            ExactState(self.optimizer).load_state_dict({**saved, "state": small})
            offloaded.adopt(read)
        if self.casts_state:
            self._cast_state()

    def _cast_state(self) -> None:
        """Bring the state of a run that stepped weights in another format into that of this one."""
        for parameter in self._places:
            is_widened = self.rounding is not None and parameter.dtype == torch.bfloat16
            state, dtype = self.optimizer.state.get(parameter, {}), torch.float32 if is_widened else parameter.dtype
            for key, value in state.items():
                if is_moved(value) and value.is_floating_point() and value.dtype != dtype:
                    state[key] = value.to(dtype)


def portions(parameters: Sequence[nn.Parameter]) -> Iterator[Sequence[nn.Parameter]]:
    """The parameters in portions of up to AT_ONCE values, a larger one by itself."""
    some: list[nn.Parameter] = []
    count = 0
    for parameter in parameters:
        if some and count + parameter.numel() > AT_ONCE:
            yield some
            some, count = [], 0
        some.append(parameter)
        count += parameter.numel()
    if some:
        yield some


def build_stepping(optimizer: Optimizer, plan: UpdatePlan, seed: int) -> Stepping:
    """How the optimizer of a run steps."""
    rounding: Rounding | None = None
    if plan.rounding is not None:
        rounding = Stochastic(seed) if plan.rounding == "stochastic" else Kahan()
    offloaded = OffloadedState(optimizer) if plan.offloads else None
    return Stepping(optimizer, plan.per_tensor, rounding, offloaded, casts_state=plan.casts_state)
