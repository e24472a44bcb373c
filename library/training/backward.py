"""The backward pass of a step: from the losses of its batches to gradients that the optimizer can take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from library.training.optim.clipping import clip_gradients, norm_of_gradients, scale_gradients

if TYPE_CHECKING:
    from accelerate import Accelerator


class Backward(Protocol):
    """How the loop back-propagates. Calls of a step, in this order: `add` for each batch; `measure`, after which the
    step may be left out; `finish`, after which the optimizer steps; `clear`, also of a step that is left out. A step
    whose numbers are read late (late.py) is never left out by the host, so `finish` must leave weights alone then."""

    def add(self, loss: Tensor) -> None:
        """Back-propagate the share of a batch, or note that it is to be."""

    def measure(self, parameters: Sequence[nn.Parameter]) -> Tensor | None:
        """The global norm of the gradients, a scalar on their device; None if it is not known yet. Weights are
        unchanged. All processes must call."""

    def finish(self, norm: Tensor | None, factor: float) -> bool:
        """Make the gradients ready for the optimizer: multiply them by `factor`, and clip them; `norm` was measured.
        False: they turned out not to be finite, when some weights may have been updated."""

    def clear(self) -> None:
        """Drop all gradients."""


@dataclass
class WholeBackward:
    """All gradients of a step are there before the optimizer steps. `max_grad_norm` 0: they are not clipped."""

    accelerator: Accelerator
    optimizer: Any
    max_grad_norm: float
    _parameters: Sequence[nn.Parameter] = ()

    def add(self, loss: Tensor) -> None:
        """Add the gradients of a batch."""
        self.accelerator.backward(loss)

    def measure(self, parameters: Sequence[nn.Parameter]) -> Tensor | None:
        """Measure the gradients. A gradient scaler knows by itself whether they are finite."""
        self._parameters = parameters
        return None if self.accelerator.scaler is not None else norm_of_gradients(parameters)

    def finish(self, norm: Tensor | None, factor: float) -> bool:
        """Scale and clip."""
        scale_gradients(self._parameters, factor)
        if self.max_grad_norm > 0:
            self.accelerator.unscale_gradients()
            scaled = norm if norm is None or factor == 1 else norm * factor
            clip_gradients(self._parameters, self.max_grad_norm, scaled)
        return True

    def clear(self) -> None:
        """Drop all gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        self._parameters = ()
