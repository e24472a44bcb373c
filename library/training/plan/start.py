"""Where a run begins: at its first step, where a saved state stopped, or where --initial_step says."""

from __future__ import annotations

from library.options.groups.adapter import AdapterOptions
from library.options.mistakes import Mistakes
from library.training.plan.duration import Duration
from library.training.saving.state import Progress, SavedState


def decide_start(
    options: AdapterOptions, resume: SavedState | None, length: Duration, mistakes: Mistakes, notes: list[str]
) -> Progress:
    """What counts as done before the first step. Without --skip_until_initial_step a run begins with a whole epoch.

    The schedule of the learning rate begins anew, as it does in sd-scripts; only --resume goes on in it.
    """
    if resume is not None:
        return Progress(**vars(resume.progress))
    per_epoch = length.steps_per_epoch
    steps = options.initial_step or ((options.initial_epoch or 1) - 1) * per_epoch
    if not steps:
        return Progress()
    flag = "initial_step" if options.initial_step else "initial_epoch"
    epoch, window = steps // per_epoch + 1, steps % per_epoch
    if not options.skip_until_initial_step:
        window = 0
    done = (epoch - 1) * per_epoch + window
    if done >= length.steps:
        mistakes.add(
            f"--{flag} {getattr(options, flag)}: {done} of {length.steps} steps would count as done",
            "give a smaller one, or a longer training",
        )
    notes.append(f"--{flag}: {done} steps count as done; weights and schedule begin anew (--resume goes on exactly)")
    return Progress(step=done, epoch=epoch, window=window)
