"""What the processes of a pair do together besides whole runs (pair_worker.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from library.objective.loss import Term, window_share
from library.options.mistakes import Mistakes
from library.runtime.launch import read_launch
from library.runtime.meeting import meet
from library.runtime.processes import Processes
from library.training.gradients import Gradients


@contextmanager
def met() -> Iterator[Processes]:
    """The processes of a group that is open in this context."""
    with meet(read_launch(os.environ, Mistakes())) as meeting, meeting.agreeing():
        meeting.open_group(cpu=True, minutes=1)
        yield Processes.current()
        meeting.end(0)


class Layers(nn.Module):
    """Four layers in float64. Of a batch each sample goes through the first, every other sample through the second, and
    none through the last."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(5, 5, dtype=torch.float64) for _ in range(4))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, x: torch.Tensor, some: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.layers[0](x))
        if some.any():
            hidden = torch.where(some[:, None], torch.tanh(self.layers[1](hidden)), hidden)
        hidden = torch.utils.checkpoint.checkpoint(self.layers[2], hidden, use_reentrant=False)
        return hidden  # type: ignore[no-any-return]


# the samples of one window, by batch: (rank, samples, counted). Unequal, and one rank computes along once.
BATCHES = ((0, (0, 1, 2)), (1, (3,)), (0, (4, 5)), (1, (6, 7, 8)), (0, (9,)))


def gradients_of(batches: Any, gradients: Gradients, model: Layers, every: int = 4) -> list[torch.Tensor | None]:
    """The gradients of a window of these (samples, is counted), of which one in `every` goes through the second
    layer."""
    data = torch.randn(10, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for number, (samples, counted) in enumerate(batches):
        with gradients.of_batch(last=number == len(batches) - 1):
            x, some = data[[*samples]], torch.tensor([sample % every == every - 1 for sample in samples])

            def compute(batch: Any, step: int, x: torch.Tensor = x, some: torch.Tensor = some) -> list[Term]:
                return [Term("loss", model(x, some).square().mean(1))]

            losses, _ = gradients.losses(compute, None, 0)  # type: ignore[arg-type]
            weights = torch.tensor([1.0 + sample % 3 for sample in samples]) * float(counted)
            (window_share(losses, weights, 10) * gradients.factor).backward()  # type: ignore[no-untyped-call]
    return [parameter.grad for parameter in model.parameters()]


def compare_gradients() -> dict[str, Any]:
    """The largest difference between the gradients of two processes and those of one with all samples in one batch, in
    each of three windows, and the parameters without one."""
    found: dict[str, Any] = {}
    with met() as processes:
        own = [(samples, True) for rank, samples in BATCHES if rank == processes.rank]
        if len(own) < 3:
            own.append((BATCHES[-1][1], False))
        options: dict[str, dict[str, bool]] = {
            "plain": {}, "view": {"bucket_view": True}, "static": {"static_graph": True},
        }  # fmt: skip
        for name, chosen in options.items():
            every = 1 if chosen.get("static_graph") else 4
            alone = gradients_of([(tuple(range(10)), True)], Gradients(), Layers(), every)
            model, differences = Layers(), []
            gradients = Gradients(processes, [model], **chosen)
            for _ in range(3):
                model.zero_grad()
                together = gradients_of(own, gradients, model, every)
                pairs = [
                    (one, two) for one, two in zip(alone, together, strict=True) if one is not None and two is not None
                ]
                differences.append(max(float((one - two).abs().max() / one.abs().max()) for one, two in pairs))
            found[name] = {
                "difference": max(differences),
                "without": [one is None for one in together] == [one is None for one in alone],
                "some without": any(one is None for one in alone),
            }
    return found


def exchange() -> list[Any]:
    """What the collectives give: sum, gather, agree, turns."""
    order: list[int] = []
    with met() as processes:
        share = torch.tensor(0.25 + processes.rank)
        assert processes.is_writer == (processes.rank == 0) and processes.share == (processes.rank, 2)
        assert float(processes.sum(share)) == 1.5 and float(share) == 0.25 + processes.rank  # the share itself stays
        assert processes.sum(torch.tensor(torch.nan if processes.rank == 1 else 1.0)).isnan()
        assert processes.gather(["a"] * processes.rank) == [[], ["a"]]
        total = float(processes.sum(torch.tensor(processes.rank + 1.0)))
        agreed = processes.agree(f"from {processes.rank}")
        for _ in processes.in_turn():
            order.append(processes.rank)
        mistakes = failing(processes)
        return [total, processes.gather(processes.rank), agreed, order, mistakes]


def failing(processes: Processes) -> list[str]:
    """What both ranks raise if the second one makes a mistake."""
    from library.options.mistakes import Mistake, UserError

    try:
        with processes.failing_together():
            if processes.rank == 1:
                raise UserError((Mistake("of the second"),))
    except UserError as error:
        return [mistake.what for mistake in error.mistakes]
    return []
