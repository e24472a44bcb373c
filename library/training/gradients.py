"""Gradients over several processes: those of a window are averaged over all ranks, by torch's DistributedDataParallel.

All that is trained is one module to it, and the loss of a batch is its forward pass: so it does not matter how often,
in which order, or by which model the trained parts are used in there (an adapter's parts are called by layers of a
frozen model, a rollout and anchors call the backbone more than once).

Parameters without a gradient in a batch are looked for in the graph (module dropout, layers behind clip_skip), unless
--ddp_static_graph promises that they are always the same: a parameter that no rank used keeps no gradient, as with one
process. Buckets of gradients then keep their layout, so that a resumed run adds in the same order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from library.objective.loss import Term, sum_terms
from library.runtime.processes import Processes

if TYPE_CHECKING:
    from library.data.batch import Batch
    from library.options.groups.processes import ProcessOptions
    from library.training.trainable import Part

Losses = Callable[["Batch", int], Sequence[Term]]


class Averaging(Protocol):
    """How gradients of several processes become one, around the passes of a batch: see Gradients."""

    @property
    def factor(self) -> int: ...

    def of_batch(self, *, last: bool) -> AbstractContextManager[None]: ...

    def losses(self, compute: Losses, batch: Batch, step: int) -> tuple[Tensor, Sequence[Term]]: ...

    def parts_stopped(self) -> None: ...


@dataclass
class Gradients:
    """Averages the gradients of `parts` over all processes; of a single process they stay as they are.

    `modules`: the trained modules, not wrapped; `sharded`: they are, and average their gradients themselves.
    """

    processes: Processes = Processes()
    modules: Sequence[nn.Module] = ()
    bucket_view: bool = False
    static_graph: bool = False
    sharded: bool = False
    _shared: Any = field(default=None, init=False)
    _is_unseen: bool = field(default=True, init=False)

    @property
    def factor(self) -> int:
        """What a batch's share of the loss is multiplied by before it is back-propagated: the average over the ranks
        divides by it."""
        return self.processes.world

    @contextmanager
    def of_batch(self, *, last: bool) -> Iterator[None]:
        """Around the forward and the backward pass of a batch. After the `last` one of a window, the gradients are
        averaged."""
        if self.processes.world == 1 or self.sharded:  # shards are averaged in each backward pass
            yield
            return
        if self._shared is None:
            self._shared, self._is_unseen = self._share(), True
        if last or (self.static_graph and self._is_unseen):  # torch has to see a static graph before it can wait
            self._is_unseen = False
            yield
        else:
            with self._shared.no_sync():
                yield

    def losses(self, compute: Losses, batch: Batch, step: int) -> tuple[Tensor, Sequence[Term]]:
        """The loss of each sample, (B,) float32, and its terms."""
        if self._shared is None:
            terms = compute(batch, step)
            return sum_terms(terms), terms
        losses, terms = self._shared(compute, batch, step)
        return losses, terms

    def parts_stopped(self) -> None:
        """Some parts are trained no longer."""
        self._shared = None

    def _share(self) -> nn.Module:
        from torch.nn.parallel import DistributedDataParallel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name in torch 2.13
            return DistributedDataParallel(
                _Trained(self.modules),
                broadcast_buffers=False,
                find_unused_parameters=not self.static_graph,
                gradient_as_bucket_view=self.bucket_view,
                static_graph=self.static_graph,
            )


class _Trained(nn.Module):
    """All that is trained, and the loss of a batch as its forward pass."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, compute: Losses, batch: Batch, step: int) -> tuple[Tensor, Sequence[Term]]:
        terms = compute(batch, step)
        return sum_terms(terms), terms


def build_gradients(
    parts: Sequence[Part], processes: Processes, options: ProcessOptions, *, sharded: bool = False
) -> Gradients:
    """The gradients of a run. `parts` hold the modules as they are, not wrapped."""
    return Gradients(
        processes,
        [part.module for part in parts],
        bucket_view=options.ddp_gradient_as_bucket_view,
        static_graph=options.ddp_static_graph,
        sharded=sharded,
    )
