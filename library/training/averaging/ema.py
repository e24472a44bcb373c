"""The exponential moving average of the trained weights, and its saved state."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from library.training.averaging.delta_average import DeltaAverage
from library.training.averaging.plan import EmaPlan
from library.training.averaging.weight_average import WeightAverage, share_unless


class Ema:
    """The average that the decays of `plan` make. `steps`: optimizer steps so far."""

    def __init__(self, average: WeightAverage | DeltaAverage, plan: EmaPlan) -> None:
        self.average = average
        self.plan = plan
        self.steps = 0

    def update(self, held: Tensor | None = None) -> None:
        """Count an optimizer step, and average the weights if an update is due; not where `held`, on the device, is
        1."""
        self.steps += 1
        if self.steps % self.plan.interval == 0:
            self.average.move(share_unless(held, 1 - self.plan.decay_at(self.steps)))

    def holding(self) -> AbstractContextManager[None]:
        """While this is open, the model holds the average."""
        return self.average.holding()

    def metadata(self) -> dict[str, str]:
        """What a file with the average says of it."""
        return self.plan.metadata() | {"ss_ema_steps": str(self.steps)} | self.average.metadata()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, and the shadows in their order."""
        return {"steps": self.steps, "shadows": self.average.shadows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state_dict(), bit for bit. Raises ValueError if it belongs to other parameters."""
        self.average.load(state["shadows"])
        self.steps = int(state["steps"])
