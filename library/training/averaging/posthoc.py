"""The two power-function averages of a run, and their saved state (arXiv 2312.02696, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from library.training.averaging.posthoc_plan import PosthocPlan
from library.training.averaging.power_profiles import Profile, kept_share
from library.training.averaging.weight_average import WeightAverage, share_unless


class PosthocEma:
    """`averages`: by width. `steps`: optimizer steps so far."""

    def __init__(self, averages: Mapping[float, WeightAverage], plan: PosthocPlan) -> None:
        self.averages = averages
        self.plan = plan
        self.steps = 0

    @property
    def size(self) -> int:
        """Bytes of both averages."""
        return sum(average.size for average in self.averages.values())

    def update(self, held: Tensor | None = None) -> None:
        """As Ema.update."""
        self.steps += 1
        if self.steps % self.plan.interval:
            return
        for width, average in self.averages.items():
            average.move(share_unless(held, 1 - kept_share(width, self.steps, self.plan.interval)))

    def profiles(self) -> list[Profile]:
        """What the averages are now: of the steps up to the last update. Empty before the first one."""
        last = self.steps - self.steps % self.plan.interval
        return [Profile(width, last) for width in self.averages] if last else []

    def holding(self, profile: Profile) -> AbstractContextManager[None]:
        """While this is open, the model holds one of the averages."""
        return self.averages[profile.width].holding()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, and the shadows of each average in the order of the parameters."""
        return {"steps": self.steps, "shadows": [average.shadows for average in self.averages.values()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state_dict(), bit for bit. Raises ValueError if it belongs to other parameters."""
        for average, shadows in zip(self.averages.values(), state["shadows"], strict=True):
            average.load(shadows)
        self.steps = int(state["steps"])
