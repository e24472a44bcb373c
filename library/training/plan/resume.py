"""Which training state a run continues, and whether it can."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from library.bounded import read_json
from library.messages import counted, listed, quoted
from library.options.groups.saving import SavingOptions
from library.options.mistakes import Mistake, Mistakes, UserError
from library.options.train_options import FLAGS
from library.training.plan.identity import ACCUMULATION, DATA, PROCESSES, SETTINGS
from library.training.plan.processes import check_window
from library.training.saving.checksums import STATE_FILE
from library.training.saving.state import Description, SavedState, read_images, read_state
from library.training.saving.whole_states import damage, newest_whole

AUTO = Path("auto")
MOST = 5  # images that are named


def decide_resume(
    folder: Path | None, options: SavingOptions, mistakes: Mistakes, notes: list[str], *, is_adapter: bool = False
) -> SavedState | None:
    """The head of the state to resume from: that of `folder`, or with --resume auto the newest whole one in the output
    folder. None for a new run or, with a mistake added, for an invalid folder."""
    if folder is None:
        return None
    if folder == AUTO:
        return _newest(options, notes)
    try:
        saved = read_state(folder)
    except UserError as error:
        mistakes.extend(tuple(_of_sd_scripts(folder, is_adapter=is_adapter)) or error.mistakes)
        return None
    if wrong := damage(saved):
        mistakes.add(f"--resume {folder}: the state is damaged: {wrong}", "use another state, or --resume auto")
        return None
    return saved


def _newest(options: SavingOptions, notes: list[str]) -> SavedState | None:
    directory = options.output_dir or Path()
    found = newest_whole(directory, options.output_name)
    notes.extend(found.notes)
    if found.state is None:
        notes.append(f"--resume auto: there is no whole state of this run in {directory}: it starts anew")
    if not options.save_state:
        notes.append(
            "--resume auto: add --save_state, so that there are states to continue from; an interrupt saves one"
        )
    return found.state


def check_continuation(  # noqa: PLR0913 - what a state is compared with
    saved: SavedState | None,
    now: Description,
    steps: int,
    mistakes: Mistakes,
    notes: list[str],
    dataset_file: str = "",
    *,
    is_adapter: bool = False,
    is_auto: bool = False,
    world: int = 1,
) -> None:
    """Refuse to resume if the result would differ from that of the uninterrupted run, or if no steps are left. What
    else has changed is noted.

    `saved` None: a new run. `dataset_file`: flag and path of the file that describes the datasets, for messages.
    `is_auto`: a run whose last files may be missing is finished.
    """
    if saved is None:
        return
    flag = "network_weights" if is_adapter else "pretrained_model_name_or_path"
    from_here = f"the saved {'adapter' if is_adapter else 'model'} as --{flag}"
    images = changed_images(read_images(saved), now.images)
    for change in _changes(saved, now, images, dataset_file):
        mistakes.add(
            f"--resume {saved.folder}: {change}",
            f"restore the earlier setting; to start a new run from the trained weights, pass {from_here} and "
            "remove --resume",
        )
    before, after = (each.identity.get(ACCUMULATION, _default(ACCUMULATION)) for each in (saved, now))
    if before != after:
        check_window(saved, before, after, world, mistakes)
    notes.extend(_allowed_changes(saved, now))
    # what is due after the last step, and the last files, may be left
    left = saved.progress.step == steps and (saved.progress.due_left or is_auto)
    if saved.progress.step >= steps and not left:
        mistakes.add(
            f"--resume {saved.folder}: it was saved after step {saved.progress.step}, and this run has "
            f"{counted(steps, 'step')}",
            "raise --max_train_steps or --max_train_epochs (both count from the first step of the first run)",
        )


def _changes(saved: SavedState, now: Description, images: str, dataset_file: str) -> Iterator[str]:
    """What has changed that the result depends on."""
    told = False
    for fact in sorted(saved.identity.keys() | now.identity.keys()):
        before, after = saved.identity.get(fact, _default(fact)), now.identity.get(fact, _default(fact))
        if before == after or fact == ACCUMULATION:
            continue
        if fact == DATA:
            told = True
            yield "images, captions, repeats or scores have changed since the state was saved" + images
        elif fact == SETTINGS:
            yield (
                f"sizes, batch size, captions or augmentation in {dataset_file or 'the dataset file'} have changed "
                "since the state was saved"
            )
        else:
            yield f"{fact} was {before} when the state was saved and is {after} now{_why(fact)}"
    if images and not told:
        yield "image files have changed since the state was saved" + images


def _why(fact: str) -> str:
    """Why a change cannot be honoured."""
    if fact == "seed":
        return ": every random draw is keyed by it"
    name = fact.removeprefix("--")
    if name.startswith(("optimizer", "lr_", "learning_rate", "unet_lr", "text_encoder_lr", "block_lr")):
        return ": the state of optimizer and schedule was computed with it"
    if name.startswith(("network_", "base_weights")):
        return ": the weights of the state are those of another adapter"
    if name in ("train_batch_size", "gradient_accumulation_steps", "resolution") or "bucket" in name:
        return ": the batches that are left would be others"
    return ""


def _allowed_changes(saved: SavedState, now: Description) -> Iterator[str]:
    """A line with the options that have changed and may. A state of an earlier version does not know them."""
    changed = [
        f"{name if name == PROCESSES else f'--{name}'} was {before}, is {now.options[name]}"
        for name, before in saved.options.items()
        if name in now.options and now.options[name] != before
    ]
    if changed:
        yield f"--resume: changed since the state was saved: {'; '.join(changed)}"


def changed_images(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """`: new: a.png; gone: b.png; edited: c.png`, or "" if they are the same, or unknown."""
    if not before or not now:
        return ""
    kinds = {
        "new": [key for key in now if key not in before],
        "gone": [key for key in before if key not in now],
        "edited": [key for key in now if key in before and _differ(before[key], now[key])],
    }
    told = [f"{kind}: {listed(keys, MOST)}" for kind, keys in kinds.items() if keys]
    return f": {'; '.join(told)}" if told else ""


def _differ(before: str, now: str) -> bool:
    """Whether an image has changed: see identity.py. The length of a file in a shard is not known."""
    hashes, lengths = zip(before.split(" "), now.split(" "), strict=True)
    return hashes[0] != hashes[1] or (lengths[0] != lengths[1] and "0" not in lengths)


def _default(fact: str) -> str:
    """The value of a fact that is not in a state: an option that was added later had its default."""
    flag = FLAGS.get(fact.removeprefix("--"))
    return "not set" if flag is None else str(flag.default)


WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of accelerate, which sd-scripts saves its states with


def _of_sd_scripts(folder: Path, *, is_adapter: bool) -> Iterator[Mistake]:
    """What can be done with a state of sd-scripts, if the folder is one: it holds no progress of ours, and an optimizer
    and random generators that belong to another order of the same data."""
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None or not ((folder / "optimizer.bin").is_file() or (folder / STATE_FILE).is_file()):
        return
    step, epoch = _progress_of_sd_scripts(folder)
    after = f", saved after step {step}" if step else f", saved after epoch {epoch}" if epoch else ""
    what = f"--resume {folder}: this is a training state of sd-scripts{after}; it can only be continued there"
    begin = f" --initial_epoch {epoch + 1}" if epoch else ""
    begin = f" --initial_step {step} --skip_until_initial_step" if step else begin
    on = f"its weights with a new optimizer: remove --resume, and pass --network_weights {quoted(weights)}{begin}"
    if not is_adapter:
        on = "the model that was saved with it, with a new optimizer: remove --resume, and pass that file as "
        on += "--pretrained_model_name_or_path"
    yield Mistake(what, f"train on from {on}")


def _progress_of_sd_scripts(folder: Path) -> tuple[int, int]:
    """(step, epoch) of a state of sd-scripts, from its train_state.json or else its name; 0 = unknown."""
    try:
        content = read_json(folder / STATE_FILE)
        return max(0, int(content["current_step"])), max(0, int(content["current_epoch"]))
    except (OSError, ValueError, LookupError, TypeError):
        step = re.search(r"-step(\d+)-state$", folder.name)
        epoch = re.search(r"-(\d{6})-state$", folder.name)
        return int(step[1]) if step else 0, int(epoch[1]) if epoch else 0
