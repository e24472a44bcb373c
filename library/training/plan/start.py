"""The step at which a run starts: the first, the one after a saved state, or the one set by --initial_step."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from library.messages import counted
from library.options.groups.adapter import AdapterOptions
from library.options.mistakes import Mistakes
from library.training.plan.duration import Duration
from library.training.saving.state import Progress, SavedState


def began(progress: Progress) -> datetime:
    """When a run began, also one that was resumed; now, if a state of an earlier version does not say."""
    try:
        return datetime.strptime(progress.began, _TIME)
    except ValueError:
        return datetime.now()


_TIME = "%Y%m%d%H%M%S"


def decide_start(
    options: AdapterOptions, resume: SavedState | None, duration: Duration, mistakes: Mistakes, notes: list[str]
) -> Progress:
    """The progress before the first step, with the time at which the run begins. Without --skip_until_initial_step a
    run starts at the beginning of an epoch.

    The learning rate schedule starts from its beginning, as in sd-scripts; only --resume continues it.
    """
    now = f"{datetime.now():{_TIME}}"
    if resume is not None:
        return replace(resume.progress, began=resume.progress.began or now)
    per_epoch = duration.steps_per_epoch
    steps = options.initial_step or ((options.initial_epoch or 1) - 1) * per_epoch
    if not steps:
        return Progress(began=now)
    flag = "initial_step" if options.initial_step else "initial_epoch"
    epoch, window = steps // per_epoch + 1, steps % per_epoch
    if not options.skip_until_initial_step:
        window = 0
    done = (epoch - 1) * per_epoch + window
    if done >= duration.steps:
        mistakes.add(
            f"--{flag} {getattr(options, flag)}: {done} of {counted(duration.steps, 'step')} would count as done",
            "use a smaller value, or train for longer",
        )
    notes.append(
        f"--{flag}: the run begins after step {done}; weights and learning rate schedule start from the beginning "
        "(use --resume to continue a run exactly)"
    )
    return Progress(step=done, epoch=epoch, window=window, began=now)
