"""What a recipe trains: the parts of the model, each with its own learning rate and, perhaps, its own end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Part:
    """One module that is trained: its log name (`unet`, `text_encoder1`), learning rate, and the optimiser step after
    which it stays as it is (None: trained to the end)."""

    name: str
    module: nn.Module
    learning_rate: float
    stop_after: int | None = None

    def trains_at(self, finished_steps: int) -> bool:
        """Whether the optimiser step that follows `finished_steps` finished ones still trains this part."""
        return self.stop_after is None or finished_steps < self.stop_after


def parameter_groups(parts: Iterable[Part]) -> list[dict[str, object]]:
    """One optimiser group for each part, in the order of the parts."""
    return [{"params": list(part.module.parameters()), "lr": part.learning_rate} for part in parts]


def trainable_parameters(parts: Sequence[Part]) -> list[nn.Parameter]:
    """All parameters that still receive gradients, in a fixed order: what clipping sees."""
    return [parameter for part in parts for parameter in part.module.parameters() if parameter.requires_grad]


def freeze_finished(parts: Iterable[Part], finished_steps: int) -> list[Part]:
    """Take the parts whose end has come out of training and return those that were still training until now.

    Their gradients become None, so every optimiser leaves them alone from here on, weight decay included.
    """
    stopped = []
    for part in parts:
        parameters = list(part.module.parameters())
        if not part.trains_at(finished_steps) and any(parameter.requires_grad for parameter in parameters):
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
            part.module.eval()
            stopped.append(part)
    return stopped
