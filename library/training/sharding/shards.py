"""The trained modules as shards: torch's FSDP2 (arXiv 2304.11277), one unit per block of the family.

torch's own `fully_shard` and not accelerate's plugin: that one takes a single model, wraps it together with its
optimizer, and casts its weights. A sharded module keeps its names; its parameters are DTensors of which each process
holds some rows. A whole tensor exists only for a moment: while its block computes, and while it is written to a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.checkpoints.header import TensorInfo
from library.checkpoints.lazy import LazyTensor, dtype_name
from library.runtime.processes import Processes
from library.training.saving.state import StateCopy, file_of
from library.training.sharding.state import FOLDER, take_apart, write_shards

if TYPE_CHECKING:
    from library.families.family import Model
    from library.runtime.precision import Precision
    from library.training.averaging.weights import Weights
    from library.training.saving.state import Progress, RunState
    from library.training.sharding.plan import Sharding
    from library.training.trainable import Trainable

OnWriter = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Makes a call of the writer a call of all processes, whose result the others do not get."""
_END: tuple[str, Any] = ("end", None)


@dataclass
class Shards:
    """The sharded modules of a run, over all its processes; `mesh` is torch's DeviceMesh.

    Only the writer decides what is saved, how often and where. While it does, the others follow: they hand over the
    parts of a tensor that it reads, hold the same version of the weights, and write their shards of a state. `weights`
    and `state` are those of the run, set once they are made. `gather` and `shape`: a parameter with all its values,
    which all processes call at once, and the shape that it then has.
    """

    processes: Processes
    modules: Sequence[nn.Module]
    mesh: Any
    weights: Weights | None = None
    state: RunState = field(default_factory=dict)
    gather: Callable[[Any], Tensor] = lambda parameter: parameter.full_tensor()
    shape: Callable[[Any], tuple[int, ...]] = lambda parameter: tuple(parameter.shape)
    _is_lazy: bool = field(default=False, init=False)
    _parameters: list[Any] = field(default_factory=list, init=False)

    def on_writer(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function that all processes call: the writer calls `call`, and the others follow it. Meanwhile the state
        dicts of the modules hold lazy tensors on the writer, which are gathered when they are read, one at a time: so
        no process ever has the whole model. The others get None."""

        def together(*arguments: Any, **named: Any) -> Any:
            if not self.processes.is_writer:
                self._follow()
                return None
            with self._leading():
                return call(*arguments, **named)

        return together

    def parted(self, progress: Progress) -> tuple[StateCopy, Callable[[Path], None]]:
        """A state without its shards, for the writer, and what adds them to its folder: all processes write theirs."""
        self._is_lazy = False
        try:
            taken = take_apart(self.state)
        finally:
            self._is_lazy = True

        def add(building: Path) -> None:
            self.processes.agree(("write", str(building.absolute())))
            write_shards(building / FOLDER, taken.tensors)

        entries = [(name, file_of(name), content) for name, content in taken.rest.items()]
        return StateCopy(deepcopy(progress), tuple(entries)), add

    @contextmanager
    def holding(self, suffix: str) -> Iterator[None]:
        """While this is open on the writer, the others hold this version of the weights."""
        self.processes.agree(("hold", suffix))
        try:
            yield
        finally:
            self.processes.agree(_END)

    @contextmanager
    def _leading(self) -> Iterator[None]:
        self._reshard()
        modules: Any = self.modules
        hooks = [module.register_state_dict_post_hook(partial(self._make_lazy)) for module in modules]
        self._is_lazy = True
        try:
            yield
        finally:
            self._is_lazy = False
            for hook in hooks:
                hook.remove()
            self.processes.agree(_END)

    def _follow(self) -> None:
        """Do what the writer asks for, until it ends that."""
        self._reshard()
        while (command := self.processes.agree(_END)) != _END:
            name, value = command
            if name == "gather":
                self._gathered(value)
            elif name == "hold" and self.weights is not None:
                with self.weights.holding(value):
                    self._follow()
            elif name == "write":
                with suppress(OSError):  # the writer has got it too
                    write_shards(Path(value) / FOLDER, take_apart(self.state).tensors)

    def _reshard(self) -> None:
        """A state dict does so, and only the writer makes one. Lists the parameters, as shards, for what is read."""
        for module in self.modules:
            for unit in module.modules():
                reshard = getattr(unit, "reshard", None)
                if callable(reshard):
                    reshard()
        self._parameters = [parameter for module in self.modules for parameter in module.parameters()]

    def _make_lazy(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if not self._is_lazy:
            return
        numbers = {id(parameter): number for number, parameter in enumerate(self._parameters)}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            info = TensorInfo(dtype_name(parameter.dtype), self.shape(parameter))
            state[prefix + name] = LazyTensor(info, partial(self._fetch, numbers[id(parameter)]))

    def _fetch(self, number: int) -> Tensor:
        self.processes.agree(("gather", number))
        return self._gathered(number)

    @torch.no_grad()
    def _gathered(self, number: int) -> Tensor:
        return self.gather(self._parameters[number]).to("cpu")


def join(shards: Shards | None, processes: Processes, weights: Weights, state: RunState) -> tuple[Weights, OnWriter]:
    """The weights of a run for what saves them, and how something happens on the writer, in a run with or without
    shards."""
    if shards is None:
        return weights, processes.on_writer
    shards.weights, shards.state = weights, state
    led = replace(weights, together=shards.holding) if processes.is_writer else weights
    return led, shards.on_writer


def shard(
    trainable: Trainable,
    model: Model,
    plan: Sharding | None,
    precision: Precision,
    device: torch.device,
    processes: Processes,
) -> Shards | None:
    """Shard the trained modules in place, block by block; each block moves to the device only in part. None: the run is
    not sharded.

    The loss is divided by the number of processes in the average over them, as with DistributedDataParallel.
    """
    if plan is None:
        return None
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (processes.world,))
    half = torch.bfloat16 if precision.mixed_precision == "bf16" else None
    settings: dict[str, Any] = {
        "mesh": mesh,
        # inputs stay as they are: bfloat16 has no timestep 999
        "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "reshard_after_forward": plan.reshard,
    }
    names = {id(module): name for name, module in model.modules().items()}
    for part in trainable.parts:
        for unit in units_of(part.module, model.family.shard_units[names[id(part.module)]]):
            fully_shard(unit, **settings)
        fully_shard(part.module, **settings)
    return Shards(processes, [part.module for part in trainable.parts], mesh)


def units_of(module: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The blocks of a module: its submodules with a name that one of these regular expressions matches."""
    return [unit for name, unit in module.named_modules() if any(re.fullmatch(pattern, name) for pattern in names)]
