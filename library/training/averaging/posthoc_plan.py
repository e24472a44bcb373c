"""Plan the averages from which tools/posthoc_ema.py makes an average of any width: how often and where they are saved.
No torch."""

from __future__ import annotations

from dataclasses import dataclass

from library.messages import counted
from library.options.groups.averaging import AveragingOptions
from library.options.mistakes import Mistakes
from library.training.averaging.power_profiles import WIDTHS, Profile, combine
from library.training.optim.optimizers import OptimizerChoice

_EXAMPLES = (0.075, 0.15, 0.2)  # widths whose error the plan tells


@dataclass(frozen=True)
class PosthocPlan:
    """`steps`: after which a snapshot of each average is saved; `interval`: optimizer steps from one update to the
    next; `on_cpu`: the averages are kept in CPU memory."""

    steps: tuple[int, ...]
    interval: int
    on_cpu: bool

    @property
    def files(self) -> int:
        """How many files the run saves."""
        return len(self.steps) * len(WIDTHS)

    @property
    def place(self) -> str:
        """Where the averages are kept, for messages."""
        return "in CPU memory" if self.on_cpu else "on the accelerator"

    def describe(self) -> str:
        """A line of the plan."""
        kept = [Profile(width, step - step % self.interval) for step in self.steps for width in WIDTHS]
        errors = [f"{width:g} ({combine(kept, Profile(width, kept[-1].step)).error:.1%})" for width in _EXAMPLES]
        return ", ".join(
            [
                f"post-hoc EMA: averages of relative width {' and '.join(f'{width:g}' for width in WIDTHS)}",
                *([f"updated every {self.interval} steps"] if self.interval > 1 else []),
                f"kept {self.place}",
                f"{counted(len(self.steps), 'snapshot')} of each",
                f"from which others can be made, with an error of the profile: {' '.join(errors)}",
            ]
        )


def decide_posthoc(
    options: AveragingOptions, steps: int, optimizer: OptimizerChoice, mistakes: Mistakes
) -> PosthocPlan | None:
    """The plan of a run of this many optimizer steps, or None without --posthoc_ema_snapshots."""
    count, interval = options.posthoc_ema_snapshots, options.ema_update_interval
    if count is None:
        return None
    if optimizer.row.schedule_free:
        mistakes.add(
            f"--posthoc_ema_snapshots with {optimizer.name}: this optimizer averages the weights itself, and saves "
            "that average",
            "remove --posthoc_ema_snapshots, or use another optimizer such as AdamW",
        )
    if count > steps // interval:
        each = f" with an update every {interval} steps" if interval > 1 else ""
        mistakes.add(
            f"--posthoc_ema_snapshots {count}: the run has only {counted(steps, 'step')}{each}",
            f"use at most {steps // interval}" if steps >= interval else "use a smaller --ema_update_interval",
        )
        return None
    return PosthocPlan(
        steps=tuple(number * steps // count for number in range(1, count + 1)),
        interval=interval,
        on_cpu=options.ema_device == "cpu",
    )
