"""An average of the trained weights in float32, and the model holding it for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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


def restore_shadows(shadows: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    """Copy saved values into shadows, bit for bit. Raises ValueError if they belong to other parameters."""
    if [shadow.shape for shadow in saved] != [shadow.shape for shadow in shadows]:
        raise ValueError("the average of the weights has other shapes")
    for shadow, value in zip(shadows, saved, strict=True):
        shadow.copy_(value)


class WeightAverage:
    """A shadow in float32 of each parameter on `device`, which follows the parameters' values after rounding: however
    coarse the weights are, the average moves.

    A part whose training has stopped stays in it: its weights are constant then, and their average converges to them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self.parameters = parameters
        self.shadows = [parameter.detach().to(device, torch.float32, copy=True) for parameter in parameters]

    @property
    def size(self) -> int:
        """Bytes of the average."""
        return sum(shadow.nbytes for shadow in self.shadows)

    @torch.no_grad()
    def move(self, share: float) -> None:
        """Give the weights of now this share of the average."""
        for shadow, parameter in zip(self.shadows, self.parameters, strict=True):
            shadow.lerp_(parameter.detach().to(shadow.device, torch.float32), share)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """While this is open, the parameters have the values of the average, rounded to their own format."""
        with restored(self.parameters):
            for shadow, parameter in zip(self.shadows, self.parameters, strict=True):
                parameter.data.copy_(shadow)
            yield

    def metadata(self) -> dict[str, str]:
        """What a file says of this average, besides how it was made: nothing."""
        return {}

    def load(self, saved: Sequence[Tensor]) -> None:
        """Restore saved shadows, bit for bit. Raises ValueError if they belong to other parameters."""
        restore_shadows(self.shadows, saved)
