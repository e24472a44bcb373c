"""Checks that a run can continue the training state of --resume."""

from __future__ import annotations

from pathlib import Path

from library.messages import counted
from library.options.mistakes import Mistakes, UserError
from library.options.train_options import FLAGS
from library.training.plan.identity import DATA, SETTINGS
from library.training.saving.state import Identity, SavedState, read_state


def decide_resume(folder: Path | None, mistakes: Mistakes) -> SavedState | None:
    """The head of the state to resume from. None without --resume or, with a mistake added, for an invalid folder."""
    if folder is None:
        return None
    try:
        return read_state(folder)
    except UserError as error:
        mistakes.extend(error.mistakes)
        return None


def check_continuation(
    saved: SavedState | None,
    identity: Identity,
    steps: int,
    mistakes: Mistakes,
    dataset_file: str = "",
    *,
    is_adapter: bool = False,
) -> None:
    """Refuse to resume if the result would differ from that of the uninterrupted run, or if no steps are left.

    `saved` None: a new run. `dataset_file`: flag and path of the file that describes the datasets, for messages.
    """
    if saved is None:
        return
    flag = "network_weights" if is_adapter else "pretrained_model_name_or_path"
    from_here = f"the saved {'adapter' if is_adapter else 'model'} as --{flag}"
    for fact in sorted(saved.identity.keys() | identity.keys()):
        before, now = saved.identity.get(fact, _default(fact)), identity.get(fact, _default(fact))
        if before != now:
            change = f"{fact} was {before} when the state was saved and is {now} now"
            if fact == DATA:
                change = "images, captions, repeats or scores have changed since the state was saved"
            elif fact == SETTINGS:
                change = f"sizes, batch size, captions or augmentation in {dataset_file or 'the dataset file'} "
                change += "have changed since the state was saved"
            mistakes.add(
                f"--resume {saved.folder}: {change}",
                f"restore the earlier setting; to start a new run from the trained weights, pass {from_here} and "
                "remove --resume",
            )
    if saved.progress.step >= steps:
        mistakes.add(
            f"--resume {saved.folder}: it was saved after step {saved.progress.step}, and this run has "
            f"{counted(steps, 'step')}",
            "raise --max_train_steps or --max_train_epochs (both count from the first step of the first run)",
        )


def _default(fact: str) -> str:
    """The value of a fact that is not in a state: an option that was added later had its default."""
    flag = FLAGS.get(fact.removeprefix("--"))
    return "not set" if flag is None else str(flag.default)
