"""The batches of one optimizer step, and its numbers: one row on the device, summed over all ranks in one collective,
and read at once, or together with those of later steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.training.nonfinite import Samples

if TYPE_CHECKING:
    from library.data.batch import Batch, Unread
    from library.data.order import BatchRequest


@dataclass(frozen=True)
class StepNumbers:
    """What was read of a step: its loss, divided by all samples; whether the norm of its gradients is finite; whether
    any rank is to stop; how many samples could not be read; losses by term, divided likewise; means by name."""

    loss: float
    has_finite_norm: bool
    stops: bool
    unread: int
    terms: Mapping[str, float]
    means: Mapping[str, float]

    @property
    def is_ordinary(self) -> bool:
        """Whether all samples were read, and loss and gradients are finite."""
        return math.isfinite(self.loss) and self.has_finite_norm and not self.unread


@dataclass(frozen=True)
class StepRow:
    """The numbers of a step as they lie on the device, (n,) float32: loss, 0 or NaN for the norm of the gradients,
    ranks that are to stop, samples that could not be read; then those of `terms`, and sum and number of `means`."""

    values: Tensor
    terms: tuple[str, ...] = ()
    means: tuple[str, ...] = ()

    def is_ordinary(self) -> Tensor:
        """As StepNumbers.is_ordinary, () bool on the device."""
        return self.values[0].isfinite() & (self.values[1] == 0) & (self.values[3] == 0)

    def read(self, values: Sequence[float]) -> StepNumbers:
        """The numbers by their names."""
        loss, norm, stops, unread = values[:4]
        terms = dict(zip(self.terms, values[4:], strict=False))
        pairs = values[4 + len(terms) :]
        means = zip(self.means, pairs[::2], pairs[1::2], strict=True)
        return StepNumbers(
            loss, norm == 0, stops > 0, round(unread), terms, {name: total / n for name, total, n in means if n}
        )


@dataclass
class Window:
    """The batches of one optimizer step: `shares` of the step's loss, one per batch, the same for each term where there
    are several, the sum and number of the losses of each term with members (`drifts`), all samples, for the message
    about a loss that is not finite, and the samples that could not be read. `size` is the number of samples on all
    ranks. `batches`: kept where the window may have to be computed again; `again`: it is."""

    shares: list[Tensor] = field(default_factory=list)
    terms: dict[str, list[Tensor]] = field(default_factory=dict)
    drifts: dict[str, list[Tensor]] = field(default_factory=dict)
    samples: list[Samples] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)
    size: int = 0
    batches: list[tuple[BatchRequest, Batch]] = field(default_factory=list)
    again: bool = False

    def row(self, norm: Tensor | None, measured: Mapping[str, Tensor], *, stop: bool) -> StepRow:
        """The numbers of this rank. `norm`: of the gradients on all ranks; None: a gradient scaler checks them.
        `measured`: further values by name, (2,) each: their sum and number."""
        loss = torch.as_tensor(sum(self.shares))
        single = [
            loss,
            torch.zeros_like(loss) if norm is None else norm.to(loss) * 0,  # NaN if it is infinite
            loss.new_full((), float(stop)),
            loss.new_full((), float(len(self.unread))),
            *(torch.as_tensor(sum(shares)) for shares in self.terms.values()),
        ]
        means = {f"drift/{name}": torch.stack(sums).sum(0) for name, sums in self.drifts.items()}
        means |= {name: pair.to(loss, non_blocking=True) for name, pair in measured.items()}
        terms = tuple(f"loss/{name}" for name in self.terms)
        return StepRow(torch.cat((torch.stack(single), *means.values())), terms, tuple(means))
