"""An average of the trained weights in float32, and the model holding it for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_PIECE = 2**26  # bytes of shadows that are averaged at a time


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


def _pieces(
    shadows: Sequence[Tensor], parameters: Sequence[nn.Parameter]
) -> Iterator[tuple[list[Tensor], list[nn.Parameter]]]:
    """Shadows and their parameters by pieces that one kernel may average: parameters of another format are copied."""
    start, size = 0, 0
    for place, shadow in enumerate(shadows):
        size += shadow.nbytes
        if size >= _PIECE or place + 1 == len(shadows):
            yield list(shadows[start : place + 1]), list(parameters[start : place + 1])
            start, size = place + 1, 0


def _copied(parameters: Sequence[nn.Parameter], device: torch.device) -> list[Tensor]:
    """The values of parameters on a device in float32. To main memory they are copied together, with one wait."""
    values = [parameter.detach().to(device, non_blocking=True) for parameter in parameters]
    if device.type == "cpu" and parameters[0].device.type != "cpu":
        torch.accelerator.synchronize()
    return [value.float() for value in values]


def share_unless(held: Tensor | None, share: float) -> float | Tensor:
    """The share, () float32 on the device: 0 where `held` is 1. Without `held` the number itself."""
    return share if held is None else (1 - held) * share


class WeightAverage:
    """A shadow in float32 of each parameter on `device`, which follows the parameters' values after rounding: however
    coarse the weights are, the average moves.

    A part whose training has stopped stays in it: its weights are constant then, and their average converges to them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self.parameters = parameters
        self.shadows = [parameter.detach().to(device, torch.float32, copy=True) for parameter in parameters]
        self._pieces = [*_pieces(self.shadows, parameters)]

    @property
    def size(self) -> int:
        """Bytes of the average."""
        return sum(shadow.nbytes for shadow in self.shadows)

    @torch.no_grad()
    def move(self, share: float | Tensor) -> None:
        """Give the weights of now this share of the average."""
        for shadows, parameters in self._pieces:
            values = _copied(parameters, shadows[0].device)
            if isinstance(share, Tensor):
                torch._foreach_lerp_(shadows, values, [share.to(shadows[0].device)] * len(shadows))
            else:
                torch._foreach_lerp_(shadows, values, share)

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
