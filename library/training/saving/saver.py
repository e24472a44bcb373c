"""Writes models and training states when they are due, and removes those that have expired."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from library.checkpoints.header import CheckpointError
from library.messages import quoted
from library.options.mistakes import Mistake, UserError
from library.training.averaging.weights import Weights
from library.training.saving.outputs import Outputs, SaveEvent
from library.training.saving.state import Progress
from library.training.trainable import SavedAt, WriteModel


@dataclass
class Saver:
    """Saves at the times and under the names of `outputs`, by `write_model` and `write_state(folder, progress)`. Models
    are saved in the versions of `outputs.suffixes`, a state with the weights in training. `after_save` is called after
    each save, `saved` with each file or folder that is complete. `release(path, remove)` removes what has expired, now
    or later. `written`: models and states that are there."""

    outputs: Outputs
    epochs: int
    write_model: WriteModel
    write_state: Callable[[Path, Progress], None]
    say: Callable[[str], None]
    weights: Weights
    after_save: Callable[[], None] = lambda: None
    saved: Callable[[Path, Literal["model", "state"]], None] = lambda path, kind: None
    release: Callable[[Path, Callable[[], None]], None] = lambda path, remove: remove()
    written: list[Path] = field(default_factory=list, init=False)
    _last_model: Path | None = field(default=None, init=False)
    _last_state: Path | None = field(default=None, init=False)

    def save_due(self, progress: Progress, *, epoch_ended: bool) -> None:
        """Save what is due now; called after every optimizer step and at the end of every epoch."""
        if epoch_ended:
            event = self.outputs.at_epoch_end(progress.epoch, self.epochs, progress.step)
        else:
            event = self.outputs.at_step(progress.step)
        if event is None:
            return
        stem = self.outputs.stem(event)
        self._save_models(stem, progress)
        if self.outputs.states:
            resumed = next_epoch(progress) if epoch_ended else progress
            self._save_state(self.outputs.directory / f"{stem}-state", resumed)
        self._remove_expired(event)
        self.after_save()

    def save_now(self, progress: Progress) -> Path:
        """Save model and state under the names of a save by steps, also without --save_state. Returns the folder of the
        state."""
        stem = self.outputs.step_stem(progress.step)
        self._save_models(stem, progress)
        folder = self.outputs.directory / f"{stem}-state"
        self._save_state(folder, progress)
        self.after_save()
        return folder

    def save_best(self, progress: Progress, about: Mapping[str, str]) -> None:
        """Save the best model so far, in place of the one before once it is complete. `about`: more metadata."""
        self._save_models(self.outputs.best_stem(), progress, about)

    def finish(self, progress: Progress) -> None:
        """Save the final model and state."""
        self._save_models(self.outputs.final_stem(), progress)
        if self.outputs.final_state:
            self._save_state(self.outputs.final_state_folder(), progress)
        self.after_save()

    def _save_models(self, stem: str, progress: Progress, about: Mapping[str, str] = MappingProxyType({})) -> None:
        for suffix in self.outputs.suffixes:
            self._save_model(self.outputs.model(stem, suffix), suffix, progress, about)

    def _save_model(self, path: Path, suffix: str, progress: Progress, about: Mapping[str, str]) -> None:
        self.say(f"saving checkpoint: {path}")
        with self.weights.holding(suffix), explain_write_errors(path):
            at = SavedAt(progress.step, progress.epoch, {**self.weights.metadata(suffix), **about})
            self.write_model(path, self.outputs.save_as, at)
        self.written.append(path)
        self._last_model = path
        self.say("model saved.")
        self.saved(path, "model")

    def _save_state(self, folder: Path, progress: Progress) -> None:
        self.say(f"saving state: {folder}")
        with explain_write_errors(folder):
            self.write_state(folder, progress)
        self.written.append(folder)
        self._last_state = folder
        self.saved(folder, "state")

    def explain_interrupt(self, step: int, resumed: Path | None) -> str:
        """What has been saved when a run is interrupted after `step` steps, and how to continue. `resumed`: the state
        that this run was resumed from."""
        saved = "no model was saved" if self._last_model is None else f"the last saved model is {self._last_model}"
        what = f"interrupted after step {step}: {saved}"
        remedy = "no state was saved to continue from; --save_state saves one with every model"
        if self._last_state is not None:
            remedy = f"continue from the last saved state with --resume {quoted(self._last_state)}"
        elif resumed is not None:
            remedy = f"no state was saved since; start from the same one again with --resume {quoted(resumed)}"
        return str(Mistake(what, remedy))

    def _remove_expired(self, event: SaveEvent) -> None:
        if event.expired_model is not None:
            for path in self.outputs.models(event.expired_model):
                self.release(path, partial(self._remove, path))
        if event.expired_state is not None and self.outputs.states:
            folder = self.outputs.directory / f"{event.expired_state}-state"
            self.release(folder, partial(self._remove, folder))

    def _remove(self, path: Path) -> None:
        if path.is_dir():
            self.say(f"removing old folder: {path}")
            shutil.rmtree(path)
        elif path.exists():
            self.say(f"removing old file: {path}")
            path.unlink()
            path.with_suffix(".yaml").unlink(missing_ok=True)


def next_epoch(progress: Progress) -> Progress:
    """The progress of a run that resumes at the beginning of the next epoch."""
    return replace(progress, epoch=progress.epoch + 1, window=0, epoch_losses=[], last_epoch_losses=[])


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn errors of the file system (disk full, folder gone, file in use) into user errors, without a traceback."""
    from safetensors import SafetensorError

    remedy = "continue with --resume from the last saved state; older files were kept, no partial file was left"
    try:
        yield
    except CheckpointError as error:  # its message says what is wrong and what to do
        raise UserError((Mistake(str(error), remedy),)) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch wraps errors of the file system in a RuntimeError; one without a cause is another problem
        cause = error.__cause__ or error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, (OSError, SafetensorError)):
            raise
        what = f"{path} could not be written: {getattr(cause, 'strerror', None) or cause}"
        raise UserError((Mistake(what, f"free some space or repair the folder, then {remedy}"),)) from error
