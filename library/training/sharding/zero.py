"""What is trained, shared out by DeepSpeed's ZeRO (arXiv 1910.02054). Needs the package `deepspeed`.

Its engine takes three things from the loop: it averages gradients, clips them, and takes the step, all with pieces of
the weights laid end to end. It is told everything else: which batch is the last of a window, the factor for samples
that were left out, and, by the norm, whether a step is taken or dropped. Weights stay float32, autocast is the run's.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]  # documented, and not in __all__

from library.objective.loss import Term, sum_terms
from library.runtime.processes import Processes
from library.training.saving.trained_weights import checksum_of, frozen_names
from library.training.sharding.shards import Shards
from library.training.sharding.zero_plan import Zero, engine_config
from library.training.trainable import Trainable

if TYPE_CHECKING:
    from library.data.batch import Batch
    from library.training.gradients import Losses
    from library.training.run import Run
    from library.training.saving.state import RunState


@dataclass
class ZeroEngine:
    """DeepSpeed's engine in the places of the loop's gradients, backward pass and optimizer. `engine`: DeepSpeed's;
    `optimizer`: the one whose steps it takes, with its learning rates; `frozen`: checksums of the weights that are not
    trained, by the name of their part.

    The calls are those of Gradients and Backward.
    """

    engine: Any
    optimizer: Any
    plan: Zero
    processes: Processes
    shards: Shards
    frozen: Mapping[str, int] = field(default_factory=dict)
    _norm: Tensor | None = None
    _factor: float = 1.0
    _is_pending: bool = False

    @property
    def factor(self) -> int:
        """What a share of the loss is multiplied by: the average over the ranks divides by it."""
        return self.processes.world

    @property
    def param_groups(self) -> Any:
        """Those of the optimizer, with their learning rates."""
        return self.optimizer.param_groups

    @contextmanager
    def of_batch(self, *, last: bool) -> Iterator[None]:
        """Around the passes of a batch: after the `last` one of a window its gradients are complete."""
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def losses(self, compute: Losses, batch: Batch, step: int) -> tuple[Tensor, Sequence[Term]]:
        """The loss of each sample, (B,) float32, and its terms."""
        losses, terms = self.engine(compute, batch, step)
        return losses, terms

    def parts_stopped(self) -> None:
        """Nothing: parts that stop are refused in the plan."""

    def add(self, loss: Tensor) -> None:
        """Back-propagate the share of a batch."""
        self._is_pending = True
        self.engine.backward(loss)

    def measure(self, parameters: Sequence[nn.Parameter]) -> Tensor | None:
        """The norm of all gradients; infinite if one of them is not finite. All processes must call."""
        zero = self.engine.optimizer
        if self.plan.stage < 3:
            zero._wait_for_offload_copies()
            norm = zero.scaled_global_norm()
        else:
            norm = import_module("deepspeed.runtime.utils").combine_grad_norm_groups(zero._get_norm_groups())
        norm = torch.as_tensor(norm, dtype=torch.float32)
        self._norm = torch.where(norm < 0, torch.inf, norm)  # what it makes of values that are not finite
        return self._norm

    def finish(self, norm: Tensor | None, factor: float) -> bool:
        """Note the factor: the engine scales and clips in its step."""
        self._factor = factor
        return True

    def step(self) -> None:
        """Clip, and take the step."""
        if self._norm is not None:
            self._step(self._norm)

    def clear(self) -> None:
        """Drop the gradients of a window without a step."""
        if self._is_pending:
            self._step(torch.tensor(torch.inf))

    def _step(self, norm: Tensor) -> None:
        """Let the engine go by this norm: it divides by the scale of its loss, and drops what is infinite."""
        zero = self.engine.optimizer
        name = "scaled_global_norm" if self.plan.stage < 3 else "_get_norm_groups"
        own: Any = norm if self.plan.stage < 3 else [norm]
        setattr(zero, name, lambda *_: own)
        if self._factor != 1:
            zero.override_loss_scale(1 / self._factor)
        try:
            self.engine.step()
        finally:
            delattr(zero, name)
            if self._factor != 1:
                zero.override_loss_scale(1.0)
            self._norm, self._factor, self._is_pending = None, 1.0, False

    def wrapped(self) -> tuple[dict[nn.Module, nn.Module], ZeroEngine]:
        """The trained modules by themselves, and what takes the place of the optimizer."""
        return {part: part for part in self.engine.module.parts}, self

    def state(self) -> RunState:
        """What a state holds in place of the trained modules and the optimizer."""
        return {"zero": ZeroState(self)}


@dataclass
class ZeroState:
    """Saves and restores the pieces of weights and optimizer state that the processes hold: each process its own."""

    zero: ZeroEngine

    def state_dict(self) -> dict[str, Any]:
        """Pieces as sharded tensors, as sharding/state.py takes them apart."""
        optimizer, mesh = self.zero.optimizer, self.zero.shards.mesh
        pieces = self._pieces()
        states = [
            {
                name: _sharded(value, mesh) if _is_piece(value, piece) else value
                for name, value in optimizer.state[piece].items()
            }
            for piece in pieces
        ]
        groups = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        frozen = dict(self.zero.frozen)
        return {
            "frozen": frozen,
            "pieces": [_sharded(piece.detach(), mesh) for piece in pieces],
            "states": states,
            "groups": groups,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state, and the weights that follow from it. Raises ValueError for one of other pieces."""
        if state["frozen"] != dict(self.zero.frozen):
            raise ValueError("its frozen blocks come from the base model, which is another one now")
        optimizer, pieces = self.zero.optimizer, self._pieces()
        saved = [_own(piece) for piece in state["pieces"]]
        if [piece.shape for piece in saved] != [piece.shape for piece in pieces]:
            raise ValueError("its pieces are of another model, or of another number of processes")
        for piece, value, own in zip(pieces, saved, state["states"], strict=True):
            piece.data.copy_(value)
            loaded = {name: _own(entry) for name, entry in own.items()}
            optimizer.state[piece] = {
                name: entry.to(piece.device) if _is_piece(entry, piece) else entry for name, entry in loaded.items()
            }
        for group, known in zip(optimizer.param_groups, state["groups"], strict=True):
            group.update(known)
        self._refresh()

    def _pieces(self) -> Sequence[Tensor]:
        zero = self.zero.engine.optimizer
        pieces: Sequence[Tensor] = (
            zero.single_partition_of_fp32_groups if self.zero.plan.stage < 3 else zero.fp32_partitioned_groups_flat
        )
        return pieces

    def _refresh(self) -> None:
        """Let the weights that compute be those of the pieces."""
        zero = self.zero.engine.optimizer
        if self.zero.plan.stage < 3:
            zero.update_lp_params()
            return
        for number in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _is_piece(value: Any, piece: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == piece.shape and value.dim() > 0


def _sharded(piece: Tensor, mesh: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(piece.to(mesh.device_type), mesh, [Shard(0)], run_check=False)


def _own(value: Any) -> Any:
    return value.to_local() if hasattr(value, "to_local") else value


class _Trained(nn.Module):
    """All that is trained, and the loss of a batch as its forward pass; the engine switches off autocast around it."""

    def __init__(self, modules: Sequence[nn.Module], autocast: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.autocast = autocast

    def forward(self, compute: Losses, batch: Batch, step: int) -> tuple[Tensor, Sequence[Term]]:
        with self.autocast():
            terms = compute(batch, step)
        return sum_terms(terms), terms


def share_by_zero(
    plan: Zero | None,
    trainable: Trainable,
    optimizer: Any,
    max_grad_norm: float,
    run: Run,
) -> ZeroEngine | None:
    """Give what is trained and its optimizer to DeepSpeed; None without it. The modules stay where they are."""
    if plan is None:
        return None
    device, processes = run.device, run.processes
    deepspeed = _package(device)
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_initialized():  # a single process, which shares out nothing, and may offload
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", store=HashStore(), rank=0, world_size=1
        )
    modules = [part.module for part in trainable.parts]
    names = {part.name: frozen_names(part) for part in trainable.parts}
    frozen = {part.name: checksum_of(part.module, names[part.name]) for part in trainable.parts if names[part.name]}
    # which it also reads in training; not before, as accelerate takes it for a launcher's
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    engine, *_ = deepspeed.initialize(
        model=_Trained(modules, run.accelerator.autocast),
        optimizer=optimizer,
        config=engine_config(plan, max_grad_norm),
        dist_init_required=False,
    )
    mesh = init_device_mesh("cpu", (processes.world,))
    shards = Shards(processes, modules if plan.stage == 3 else (), mesh, gather=_whole, shape=_shape)
    return ZeroEngine(engine, optimizer, plan, processes, shards, frozen)


def _package(device: torch.device) -> Any:
    """The package, which looks for a GPU, builds a collective of its own with a compiler, and talks a lot."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # of how it calls torch
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed, ops = import_module("deepspeed"), import_module("deepspeed.ops")

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _whole(parameter: Any) -> Tensor:
    """A parameter with all its values. All processes must call."""
    deepspeed = import_module("deepspeed")
    with deepspeed.zero.GatheredParameters([parameter]):
        whole: Tensor = parameter.detach().clone()
    return whole
