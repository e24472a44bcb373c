"""The exponential moving average of the trained weights, and its saved state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from library.training.averaging.plan import EmaPlan


@contextmanager
def restored(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Copy the values of parameters to CPU memory, and put them back bit for bit afterwards.

    A run has no gradients at these moments, so its peak of memory stays where it was.
    """
    copies = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    try:
        yield
    finally:
        for parameter, value in zip(parameters, copies, strict=True):
            parameter.data.copy_(value)


class Ema:
    """A shadow in float32 of each parameter on `device`, updated from the parameters' values after rounding: however
    coarse the weights are, the average moves.

    A part whose training has stopped stays in it: its weights are constant then, and their average converges to them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], plan: EmaPlan, device: torch.device) -> None:
        self.parameters = parameters
        self.plan = plan
        self.steps = 0
        self.shadows = [parameter.detach().to(device, torch.float32, copy=True) for parameter in parameters]

    @property
    def size(self) -> int:
        """Bytes of the average."""
        return sum(shadow.numel() * shadow.element_size() for shadow in self.shadows)

    @torch.no_grad()
    def update(self) -> None:
        """Count an optimizer step, and average the weights if an update is due."""
        self.steps += 1
        if self.steps % self.plan.interval:
            return
        share = 1 - self.plan.decay_at(self.steps)
        for shadow, parameter in zip(self.shadows, self.parameters, strict=True):
            shadow.lerp_(parameter.detach().to(shadow.device, torch.float32), share)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """While this is open, the parameters have the values of the average, rounded to their own format."""
        with restored(self.parameters):
            for shadow, parameter in zip(self.shadows, self.parameters, strict=True):
                parameter.data.copy_(shadow)
            yield

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, and the shadows in the order of the parameters."""
        return {"steps": self.steps, "shadows": self.shadows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state_dict(), bit for bit. Raises ValueError if it belongs to other parameters."""
        saved = state["shadows"]
        if [shadow.shape for shadow in saved] != [shadow.shape for shadow in self.shadows]:
            raise ValueError("the average of the weights has other shapes")
        for shadow, value in zip(self.shadows, saved, strict=True):
            shadow.copy_(value)
        self.steps = int(state["steps"])
