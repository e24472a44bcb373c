"""Whether the state that --resume names can be continued by this run."""

from __future__ import annotations

from pathlib import Path

from library.options.mistakes import Mistakes, UserError
from library.options.train_options import FLAGS
from library.training.plan.identity import DATA, SETTINGS
from library.training.saving.state import Identity, SavedState, read_state


def decide_resume(folder: Path | None, mistakes: Mistakes) -> SavedState | None:
    """The head of the state to go on from, or None without --resume or with a folder that is none (a mistake)."""
    if folder is None:
        return None
    try:
        return read_state(folder)
    except UserError as error:
        mistakes.extend(error.mistakes)
        return None


def check_continuation(
    saved: SavedState | None, identity: Identity, steps: int, mistakes: Mistakes, dataset_file: str = ""
) -> None:
    """Refuse to go on where the result would not be the one of the uninterrupted run, or where nothing is left to
    do. `dataset_file` is what messages call the file that describes the datasets; without a saved state all is well."""
    if saved is None:
        return
    for fact in sorted(saved.identity.keys() | identity.keys()):
        before, now = saved.identity.get(fact, _unsaid(fact)), identity.get(fact, _unsaid(fact))
        if before != now:
            change = f"{fact} was {before} when the state was saved and is {now} now"
            if fact == DATA:
                change = "images, captions, repeats or scores are other ones than when the state was saved"
            elif fact == SETTINGS:
                change = f"{dataset_file or 'no dataset file'} describes other sizes, batches, captions or "
                change += "augmentation than when the state was saved"
            mistakes.add(
                f"--resume {saved.folder}: {change}",
                "give the run what it had; to start a new run from the trained weights, give the saved model as "
                "--pretrained_model_name_or_path and leave --resume out",
            )
    if saved.progress.step >= steps:
        mistakes.add(
            f"--resume {saved.folder}: {saved.progress.step} steps are done and this run has {steps}",
            "raise --max_train_steps or --max_train_epochs (both count from the very first step)",
        )


def _unsaid(fact: str) -> str:
    """The value of a fact that a state does not tell: an option that came later was at its default."""
    flag = FLAGS.get(fact.removeprefix("--"))
    return "nothing" if flag is None else str(flag.default)
