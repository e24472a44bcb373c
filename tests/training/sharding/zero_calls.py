"""What the processes of a pair do with DeepSpeed's engine besides whole runs (pair_worker.py)."""

from __future__ import annotations

import copy
import importlib
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from library.objective.loss import Term
from library.training.optim.clipping import clip_gradients
from library.training.recipe import Recipe
from library.training.sharding.zero import ZeroEngine, ZeroState, share_by_zero
from library.training.sharding.zero_plan import Zero
from library.training.trainable import Group, Part, Trainable, parameter_groups
from tests.training.rank_calls import met
from tests.training.sharding.shard_calls import disturbed, make_layers
from train_db import RECIPE

__all__ = ["RECIPE"]  # of the runs
PLANS = {"1": (1, False, False), "2": (2, False, False), "3": (3, False, False), "3 offloaded": (3, True, True)}


def skipping(recipe: Recipe, words: Sequence[str]) -> int:
    """A run whose second loss is not a number."""
    if "deepspeed" in sys.modules:  # it keeps the groups of the run before
        importlib.import_module("deepspeed.comm.comm").cdb = None
        importlib.import_module("deepspeed.utils.groups")._release_process_group_references()
    return disturbed(recipe, words, lambda step: math.nan if step == 1 else 1.0)


class _Pair:
    """Layers that an engine trains, and the same ones as a whole, trained by all samples in one process."""

    def __init__(self, plan: Zero, processes: Any) -> None:
        self.processes = processes
        self.model: Any = make_layers()
        self.whole = copy.deepcopy(self.model)
        groups = (Group("low", ("0.weight", "0.bias", "2.weight"), 1e-2), Group("high", ("2.bias", "4.weight"), 5e-3))
        parts = [Part("layers", module, 1e-2, groups=groups) for module in (self.model, self.whole)]
        for module in (self.model, self.whole):
            module[4].bias.requires_grad_(requires_grad=False)  # as a block with a learning rate of 0
        trainable = Trainable((parts[0],), frozenset())
        self.optimizer, self.reference = (
            torch.optim.AdamW(parameter_groups([part]), weight_decay=0.1)  # type: ignore[arg-type]
            for part in parts
        )
        run: Any = SimpleNamespace(
            processes=processes, device=torch.device("cpu"), accelerator=SimpleNamespace(autocast=nullcontext)
        )
        made = share_by_zero(plan, trainable, self.optimizer, 0.5, run)
        assert made is not None
        self.zero: ZeroEngine = made

    def window(self, seed: int, *, factor: float = 1.0, steps: bool = True, spoiled: bool = False) -> list[float]:
        """Two batches and a step, of both; the norms that both measured. `steps`: else the window is dropped."""
        data = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed)) * 10
        for number, batch in enumerate(data.chunk(2)):
            own = batch.chunk(self.processes.world)[self.processes.rank]
            with self.zero.of_batch(last=number == 1):
                losses, _ = self.zero.losses(lambda *_, own=own: [_term(self.model(own))], own, 0)  # type: ignore[arg-type, misc]
                self.zero.add(losses.sum() * self.zero.factor * (math.inf if spoiled else 1))
        norm = self.zero.measure(())
        assert norm is not None
        if not steps:
            self.zero.clear()
            return [float(norm)]
        self.whole(data).square().sum().mul(factor).backward()
        expected = nn.utils.get_total_norm([each.grad for each in self.whole.parameters() if each.requires_grad])  # type: ignore[misc]
        clip_gradients([each for each in self.whole.parameters() if each.requires_grad], 0.5)
        self.reference.step()
        self.reference.zero_grad()
        self.zero.finish(norm, factor)
        self.zero.step()
        self.zero.clear()
        return [float(norm) * factor, float(expected)]

    def values(self) -> list[Tensor]:
        """The weights of the engine, whole, as files are written."""
        gather = self.zero.shards.gather if self.zero.plan.stage == 3 else lambda parameter: parameter.detach().clone()
        return [gather(parameter) for parameter in self.model.parameters()]

    def difference(self) -> float:
        """Between the weights of both."""
        pairs = zip(self.values(), self.whole.parameters(), strict=True)
        return max(float((one - two).abs().max()) for one, two in pairs)


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether all tensors are equal bit for bit."""
    return all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


def _term(output: Tensor) -> Term:
    return Term("loss", output.flatten().square(), 1.0)


def engine() -> dict[str, Any]:
    """By stage: whether norms are those of a whole model, the difference after windows with and without samples left
    out, whether a dropped window changes nothing, and whether a restored state goes on bit for bit."""
    found: dict[str, Any] = {}
    with met() as processes:
        for name, (stage, optimizer_on_cpu, weights_on_cpu) in PLANS.items():
            pair = _Pair(Zero(processes.world, stage, optimizer_on_cpu, weights_on_cpu), processes)
            norms = [pair.window(0), pair.window(1, factor=1.5)]
            before = pair.values()
            (infinite,) = pair.window(2, steps=False, spoiled=True)
            pair.window(3, steps=False)
            unchanged = same(before, pair.values())
            norms.append(pair.window(4))
            difference = pair.difference()
            state = copy.deepcopy(ZeroState(pair.zero).state_dict())
            pair.window(5)
            after = pair.values()
            ZeroState(pair.zero).load_state_dict(state)
            pair.window(5)
            found[name] = {
                "norms": max(abs(one - two) / two for one, two in norms),
                "difference": difference,
                "infinite": math.isinf(infinite),
                "unchanged": unchanged,
                "resumed": same(after, pair.values()),
            }
    return found
