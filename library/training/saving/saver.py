"""Writes models and training states when they are due, and removes those that have expired."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Protocol

from library.messages import quoted
from library.options.mistakes import Mistake
from library.training.averaging.weights import Weights
from library.training.ending import size_of
from library.training.saving.outputs import Outputs, SaveEvent
from library.training.saving.state import Progress
from library.training.saving.unsaved import (
    AGAIN_AFTER,
    PATIENCE,
    SHARE_OF_ESTIMATE,
    Expired,
    Postponed,
    Unsaved,
    check_space,
    explain_write_errors,
    other_folders,
    patiently,
)
from library.training.trainable import SavedAt, WriteModel


class States(Protocol):
    """Writes training states: see state_writer.StateWriter."""

    def begin(self, folder: Path, progress: Progress, done: Callable[[], None]) -> None: ...

    def collect(self, *, wait: bool = False) -> None: ...


Settle = Callable[[Sequence[Path], Unsaved | None], None]
"""Ends a save: what it wrote, and why it failed, if it did."""


@dataclass
class Saver:
    """Saves at the times and under the names of `outputs`: models by `write_model`, states by `states`, which writes
    them beside the training. Models are saved in the versions of `outputs.suffixes`, a state with the weights in
    training. `after_save` is called after each save, `saved` with each file or folder that is complete. `release(path,
    remove)` removes what has expired, now or later. `written`: models and states that are there. `sizes`: bytes of a
    model and of a state, as estimated.

    A save that fails is told by `warn` and tried again later (unsaved.py); only one at the end of the run raises.
    """

    outputs: Outputs
    epochs: int
    write_model: WriteModel
    states: States
    say: Callable[[str], None]
    weights: Weights
    after_save: Callable[[], None] = lambda: None
    saved: Callable[[Path, Literal["model", "state"]], None] = lambda path, kind: None
    release: Callable[[Path, Callable[[], None]], None] = lambda path, remove: remove()
    warn: Callable[[str], None] = print
    sizes: tuple[int, int] = (0, 0)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    written: list[Path] = field(default_factory=list, init=False)
    _last_model: Path | None = field(default=None, init=False)
    _last_state: Path | None = field(default=None, init=False)
    _postponed: Postponed = field(init=False)
    _expired_models: Expired = field(default_factory=Expired, init=False)
    _expired_states: Expired = field(default_factory=Expired, init=False)
    _saved_models: bool = field(default=False, init=False)
    _settle: Settle = field(default=lambda new, problem: None, init=False)  # of the state that is being written
    _substitutes: list[Path] = field(default_factory=list, init=False)
    _measured: dict[str, int] = field(default_factory=dict, init=False)  # bytes of the last model and state

    def __post_init__(self) -> None:
        self._postponed = Postponed(self.clock)

    def is_due(self, step: int) -> bool:
        """Whether a save is due after this step by the number of steps."""
        return self.outputs.at_step(step) is not None

    def save_due(self, progress: Progress, *, epoch_ended: bool) -> None:
        """Save what is due now; called after every optimizer step and at the end of every epoch."""
        if epoch_ended:
            event = self.outputs.at_epoch_end(progress.epoch, self.epochs, progress.step)
        else:
            event = self.outputs.at_step(progress.step)
        self._collect(wait=event is not None)
        if event is None:
            if self._postponed.is_due and not epoch_ended:
                self._save_again(progress)
            return
        resumed = next_epoch(progress) if epoch_ended else progress
        self._save(self.outputs.stem(event), progress, resumed, partial(self._settle_due, self._expired_files(event)))

    def _settle_due(
        self, expired_files: tuple[list[Path], list[Path]], new: Sequence[Path], problem: Unsaved | None
    ) -> None:
        """Remove what a save by the plan has made superfluous, as far as it succeeded. `new`: what it wrote."""
        models, states = expired_files
        expired = self._expired_models.after(models, succeeded=self._saved_models)
        expired += self._expired_states.after(states, succeeded=problem is None)
        if problem is not None:
            self._postpone(problem)
        else:
            self._postponed.succeeded()
            expired += self._substitutes if expired else ()
            self._substitutes.clear()
        for path in expired:
            self.release(path, partial(self._remove, path))
        self.after_save()

    def _collect(self, *, wait: bool = False) -> None:
        """Settle the save whose state has been written meanwhile. `wait`: until it is."""
        try:
            self.states.collect(wait=wait)
        except Unsaved as error:
            self._settle((), error)

    def _save(self, stem: str, progress: Progress, resumed: Progress, settle: Settle) -> None:
        """Save the models of a stem, and with --save_state begin to save the state that is resumed from there. `settle`
        is called when all of it is complete, or why it failed is known; `_saved_models`: whether the models are
        complete."""
        before = len(self.written)
        self._saved_models = False
        try:
            self._save_models(stem, progress)
            self._saved_models = True
            new = self.written[before:]
            if self.outputs.states:
                folder = self.outputs.directory / f"{stem}-state"
                self._settle = lambda _, problem: settle(new, problem)
                self._save_state(folder, resumed, lambda: settle([*new, folder], None))
            else:
                settle(new, None)
        except Unsaved as error:
            settle(self.written[before:], error)

    def _save_again(self, progress: Progress) -> None:
        """Save as after a save by steps, in place of the last that failed. Where old files are removed, these go with
        the next save that succeeds."""

        def settle(new: Sequence[Path], problem: Unsaved | None) -> None:
            if problem is not None:
                for path in new:  # half of a save, with each attempt, would fill the disk
                    self._remove(path)
                self._postpone(problem)
                return
            self._substitutes += new
            self._postponed.succeeded()
            self.after_save()

        self._save(self.outputs.step_stem(progress.step), progress, progress, settle)

    def _postpone(self, error: Unsaved) -> None:
        """Tell that a save failed, and when it is tried again."""
        self._postponed.failed()
        last = self._last_state or self._last_model
        kept = "nothing has been saved yet" if last is None else f"the last that is complete is {last}"
        self.warn(
            f"NOT SAVED, the training goes on and saves again within {AGAIN_AFTER / 60:.0f} minutes; {kept}:\n{error}"
        )

    def save_now(self, progress: Progress) -> Path:
        """Save model and state under the names of a save by steps, also without --save_state; in another folder if
        they cannot be saved in theirs. Returns the folder of the state. Raises Unsaved."""
        stem = self.outputs.step_stem(progress.step)

        def save(outputs: Outputs) -> Path:
            self._save_models(stem, progress, outputs=outputs)
            folder = outputs.directory / f"{stem}-state"
            self._save_state(folder, progress, wait=True)
            return folder

        self._collect(wait=True)
        try:
            folder = save(self.outputs)
        except Unsaved as error:
            self.warn(str(error))
            folder = self._elsewhere(save, error)
        self.after_save()
        return folder

    def stop(self, progress: Progress) -> str:
        """Save model and state of a run that is stopped, and say how to continue."""
        folder = self.save_now(progress)
        return str(
            Mistake(
                f"stopped after step {progress.step}: model and state are saved",
                f"continue with --resume {quoted(folder)}, or with --resume auto",
            )
        )

    def save_best(self, progress: Progress, about: Mapping[str, str]) -> bool:
        """Save the best model so far, in place of the one before once it is complete. `about`: more metadata. One that
        cannot be saved is told of, and the one before stays: False."""
        try:
            self._save_models(self.outputs.best_stem(), progress, about)
        except Unsaved as error:
            self.warn(f"the best model so far was NOT SAVED; an earlier one was kept:\n{error}")
            return False
        return True

    def finish(self, progress: Progress) -> None:
        """Save the final model and state. If that fails, save them in another folder, and try again for ten minutes.
        Raises Unsaved if they are in the other folder, or nowhere."""

        def save(outputs: Outputs) -> Path:
            self._save_models(outputs.final_stem(), progress, outputs=outputs)
            if outputs.final_state:
                self._save_state(outputs.final_state_folder(), progress, wait=True)
            return outputs.directory

        self._collect(wait=True)
        try:
            save(self.outputs)
        except Unsaved as error:
            self.warn(f"the final model is NOT SAVED yet:\n{error}")
            self._finish_later(save, error)
        self.after_save()

    def _finish_later(self, save: Callable[[Outputs], Path], error: Unsaved) -> None:
        """Save the final files in another folder first, so that nothing can be lost, then wait for their own."""
        other: Path | None = None
        try:
            other = self._elsewhere(save, error)
        except Unsaved as worse:
            self.warn(str(worse))
        self.warn(f"trying {self.outputs.directory} again for {PATIENCE / 60:.0f} minutes; Ctrl-C ends that")
        if patiently(lambda: (save(self.outputs), None)[1], self.clock, self.sleep):
            if other is not None:
                self.written = [path for path in self.written if other not in path.parents]
                shutil.rmtree(other, ignore_errors=True)
            return
        if other is None:
            raise error
        what = f"{error.mistakes[0].what}: the final model is in {other} instead"
        raise Unsaved((Mistake(what, "move it from there"),)) from error

    def _elsewhere(self, save: Callable[[Outputs], Path], error: Unsaved) -> Path:
        """Save in the first other folder that can be written. Returns what `save` does. Raises Unsaved."""
        for folder in other_folders(self.outputs.directory, self.outputs.final_stem()):
            try:
                saved = save(replace(self.outputs, directory=folder))
            except Unsaved:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            self.warn(f"saved in another folder instead: {saved}")
            return saved
        raise error

    def _save_models(
        self,
        stem: str,
        progress: Progress,
        about: Mapping[str, str] = MappingProxyType({}),
        outputs: Outputs | None = None,
    ) -> None:
        outputs = outputs or self.outputs
        for suffix in outputs.suffixes:
            self._save_model(outputs.model(stem, suffix), suffix, progress, about)

    def _save_model(self, path: Path, suffix: str, progress: Progress, about: Mapping[str, str]) -> None:
        self.say(f"saving checkpoint: {path}")
        check_space(path, self._measured.get("model", self.sizes[0] * SHARE_OF_ESTIMATE))
        with self.weights.holding(suffix), explain_write_errors(path):
            at = SavedAt(progress.step, progress.epoch, {**self.weights.metadata(suffix), **about})
            self.write_model(path, self.outputs.save_as, at)
        self.written.append(path)
        self._measured["model"] = size_of(path)
        self._last_model = path
        self.say("model saved.")
        self.saved(path, "model")

    def _save_state(
        self, folder: Path, progress: Progress, done: Callable[[], None] = lambda: None, *, wait: bool = False
    ) -> None:
        """Begin to save a state, or with `wait` save it. `done` is called when it is whole."""
        self.say(f"saving state: {folder}")
        check_space(folder, self._measured.get("state", self.sizes[1] * SHARE_OF_ESTIMATE))
        self.states.begin(folder, progress, partial(self._state_is_whole, folder, done))
        self.states.collect(wait=wait)

    def _state_is_whole(self, folder: Path, done: Callable[[], None]) -> None:
        self.written.append(folder)
        self._measured["state"] = size_of(folder)
        self._last_state = folder
        self.saved(folder, "state")
        done()

    def explain_interrupt(self, step: int, resumed: Path | None) -> str:
        """What has been saved when a run is stopped at once after `step` steps, and how to continue. `resumed`: the
        state that this run was resumed from."""
        saved = "no model was saved" if self._last_model is None else f"the last saved model is {self._last_model}"
        what = f"interrupted after step {step}: {saved}"
        remedy = "no state was saved to continue from; --save_state saves one with every model"
        if self._last_state is not None:
            remedy = f"continue from the last saved state with --resume {quoted(self._last_state)}"
        elif resumed is not None:
            remedy = f"no state was saved since; start from the same one again with --resume {quoted(resumed)}"
        return str(Mistake(what, remedy))

    def _expired_files(self, event: SaveEvent) -> tuple[list[Path], list[Path]]:
        """The models, and the state, that a save makes superfluous."""
        models = [] if event.expired_model is None else self.outputs.models(event.expired_model)
        if event.expired_state is None or not self.outputs.states:
            return models, []
        return models, [self.outputs.directory / f"{event.expired_state}-state"]

    def _remove(self, path: Path) -> None:
        try:
            if path.is_dir():
                self.say(f"removing old folder: {path}")
                shutil.rmtree(path)
            elif path.exists():
                self.say(f"removing old file: {path}")
                path.unlink()
                path.with_suffix(".yaml").unlink(missing_ok=True)
        except OSError as error:  # another program reads it, on Windows
            self.warn(f"{path} could not be removed: {error.strerror or error}")


def next_epoch(progress: Progress) -> Progress:
    """The progress of a run that resumes at the beginning of the next epoch."""
    last = progress.epoch_losses
    return replace(progress, epoch=progress.epoch + 1, window=0, epoch_losses=[], last_epoch_losses=list(last))
