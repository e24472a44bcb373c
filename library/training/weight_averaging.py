"""The weights that a saved file holds, where they are other than those in training: averages over the steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True)
class Weights:
    """The weights of a run: those in training, and what files, images and validation take in their place.

    Today the average of a schedule-free optimizer (arXiv 2405.15682), which `optimizer` may be; not one that
    accelerate has wrapped.
    """

    optimizer: Optimizer

    def update(self) -> None:
        """Called after each optimizer step. A schedule-free optimizer averages in its own step."""

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While this is open the model holds the weights that a saved file shall have.

        Afterwards the weights are what they were, bit for bit (going there and back by the optimizer's own formula
        rounds), so saving does not disturb a run. Without averages nothing changes.
        """
        averaging: Any = self.optimizer
        if not (callable(getattr(averaging, "eval", None)) and callable(getattr(averaging, "train", None))):
            yield
            return
        parameters = list(chain.from_iterable(group["params"] for group in averaging.param_groups))
        kept = [parameter.detach().cpu().clone() for parameter in parameters]
        averaging.eval()
        try:
            yield
        finally:
            averaging.train()
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.data.copy_(value)
