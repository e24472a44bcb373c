"""What the processes of a pair do with shards besides undisturbed runs (pair_worker.py)."""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from library.checkpoints.lazy import LazyTensor
from library.runtime.processes import Processes
from library.training.command import run_recipe
from library.training.optim.clipping import clip_gradients
from library.training.optim.constructors import load
from library.training.optim.optimizer_table import OPTIMIZERS
from library.training.recipe import Recipe
from library.training.sharding.shards import Shards
from library.training.training_loss import TrainingLoss
from tests.training.rank_calls import met
from train_db import RECIPE

__all__ = ["RECIPE"]  # of the runs


def make_layers() -> nn.Sequential:
    """Layers whose rows cannot be shared out evenly, one with fewer rows than processes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 17), nn.Tanh(), nn.Linear(17, 3), nn.Tanh(), nn.Linear(3, 1))


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    """Between the parameters of a sharded module and those of another one."""
    sharded: Any = one
    pairs = zip(sharded.parameters(), other.parameters(), strict=True)
    return max(float((first.full_tensor() - second).abs().max()) for first, second in pairs)


def optimizers() -> dict[str, float]:
    """Differences after three clipped steps between shards and a module that sees all samples."""
    found: dict[str, float] = {}
    with met() as processes:
        for row in OPTIMIZERS:
            if not row.sharded:
                continue
            sharded = make_layers()
            whole = copy.deepcopy(sharded)
            fully_shard(sharded, mesh=init_device_mesh("cpu", (processes.world,)))
            arguments: dict[str, Any] = {**row.defaults, "lr": 1e-2}
            steppers = [load(row.path)(module.parameters(), **arguments) for module in (sharded, whole)]
            for step in range(3):
                data = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)) * 10
                sharded(data.chunk(2)[processes.rank]).square().sum().mul(processes.world).backward()
                whole(data).square().sum().backward()
                for module, stepper in zip((sharded, whole), steppers, strict=True):
                    clip_gradients(list(module.parameters()), 0.5)
                    stepper.step()
                    stepper.zero_grad()
            with torch.no_grad():
                found[row.name] = largest_difference(sharded, whole)
    return found


def gathering() -> dict[str, Any]:
    """What the writer reads while it gathers: in any order, twice, and until it fails."""
    found: dict[str, Any] = {}
    with met() as processes:
        whole, sharded = make_layers(), make_layers()
        fully_shard(sharded, mesh=init_device_mesh("cpu", (processes.world,)))
        shards = Shards(processes, [sharded], None)

        def read() -> None:
            state: dict[str, Any] = sharded.state_dict()
            found["lazy"] = all(isinstance(entry, LazyTensor) for entry in state.values())
            for _ in range(2):
                equal = [torch.equal(state[name].load(), whole.state_dict()[name]) for name in reversed(state)]
                found["equal"] = found.get("equal", True) and len(equal) == 6 and all(equal)

        def fail() -> None:
            raise OSError("the disk is full")

        shards.on_writer(read)()
        try:
            shards.on_writer(fail)()
        except OSError as error:
            found["raised"] = str(error)
        found["afterwards"] = int(processes.sum(torch.ones(1)))
        found["sharded again"] = not any(isinstance(entry, LazyTensor) for entry in sharded.state_dict().values())
    return found


def stopped(recipe: Recipe, words: Sequence[str]) -> int:
    """A run whose second process gets a SIGTERM in its first step."""

    left = [signal.SIGTERM]

    def signalled(step: int) -> float:
        if Processes.current().rank == 1 and left:
            signal.raise_signal(left.pop())
        return 1.0

    return disturbed(recipe, words, signalled)


def not_finite(recipe: Recipe, words: Sequence[str]) -> int:
    """A run whose second loss is not a number."""
    return disturbed(recipe, words, lambda step: math.nan if step else 1.0)


def disturbed(recipe: Recipe, words: Sequence[str], factor: Callable[[int], float]) -> int:
    """A run whose predictions are multiplied by a function of the number of finished steps."""
    compute, predict, now = TrainingLoss.__call__, TrainingLoss.predict, [0]

    def computing(self: TrainingLoss, batch: Any, step: int) -> Any:
        now[0] = step
        return compute(self, batch, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoss, "__call__", computing)
        patch.setattr(TrainingLoss, "predict", lambda self, inputs: predict(self, inputs) * factor(now[0]))
        return run_recipe(recipe, words)
