"""Averaged weights: what is saved, drawn with and validated when it differs from the weights in training.

A moving average (EMA) belongs here too; its state is one more entry of the mapping in session.py that resumes.
"""

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
    """The weights in training, and their average, which saved files, sample images and validation use.

    Only schedule-free optimizers average (arXiv 2405.15682). `optimizer` is the unwrapped one, not accelerate's.
    """

    optimizer: Optimizer

    def update(self) -> None:
        """Called after each optimizer step. Nothing to do: a schedule-free optimizer averages in its step."""

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While this is open, the model holds the averaged weights. Without an average nothing changes.

        Afterwards the weights are restored from a copy, bit for bit, as the optimizer's own formula for the way back
        rounds. So saving does not affect the run.
        """
        averaging: Any = self.optimizer
        if not (callable(getattr(averaging, "eval", None)) and callable(getattr(averaging, "train", None))):
            yield
            return
        parameters = list(chain.from_iterable(group["params"] for group in averaging.param_groups))
        copies = [parameter.detach().cpu().clone() for parameter in parameters]
        averaging.eval()
        try:
            yield
        finally:
            averaging.train()
            for parameter, value in zip(parameters, copies, strict=True):
                parameter.data.copy_(value)
