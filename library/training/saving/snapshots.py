"""Snapshots of the averages of post-hoc EMA: files of their own, one for each average and moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from library.training.averaging.posthoc import PosthocEma
from library.training.averaging.snapshot_files import file_name, snapshot_metadata, step_of
from library.training.saving.state import Progress
from library.training.saving.unsaved import Unsaved, explain_write_errors
from library.training.trainable import SavedAt, WriteModel


@dataclass
class Snapshots:
    """Saves `posthoc` (None: nothing) at the steps of its plan, as models that can be used by themselves.

    `resumed`: steps of the run that is resumed. Its snapshots are kept; those of any other run go with the first save.
    A snapshot that cannot be written is told of by `warn`: the others still make averages.
    """

    posthoc: PosthocEma | None
    folder: Path | None
    write_model: WriteModel
    say: Callable[[str], None]
    resumed: int
    warn: Callable[[str], None] = print
    _is_first: bool = field(default=True, init=False)

    def is_due(self, step: int) -> bool:
        """Whether a snapshot is due after this step."""
        return self.posthoc is not None and step in self.posthoc.plan.steps

    def due(self, progress: Progress, *, epoch_ended: bool) -> None:
        """Save the averages if a snapshot is due."""
        if self.posthoc is None or self.folder is None or epoch_ended or not self.is_due(progress.step):
            return
        for profile in self.posthoc.profiles():
            path = self.folder / file_name(progress.step, profile.width)
            self.say(f"saving snapshot: {path}")
            about = snapshot_metadata(profile)
            try:
                with self.posthoc.holding(profile), explain_write_errors(path):
                    self.write_model(path, "safetensors", SavedAt(progress.step, progress.epoch, about))
            except Unsaved as error:
                self.warn(f"the snapshot was NOT SAVED, the training goes on:\n{error}")
                continue
            if self._is_first:
                self._remove_others(self.folder, progress.step)
            self._is_first = False

    def _remove_others(self, folder: Path, step: int) -> None:
        """Remove the snapshots of an earlier run, which must not be mixed with those of this one."""
        for path in sorted(folder.iterdir()):
            of_file = step_of(path)
            if of_file is not None and of_file != step and of_file > self.resumed:
                self.say(f"removing old file: {path}")
                path.unlink()
                path.with_suffix(".yaml").unlink(missing_ok=True)
