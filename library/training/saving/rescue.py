"""Save model and state of the last finished step when an error ends a run, so that nothing is lost by it.

The writing process does that alone, also if another one has failed. In a sharded run none can: all save together, if
all have come to the same error, and nothing is saved if one has failed by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.messages import quoted
from library.options.mistakes import Mistake, UserError
from library.runtime.out_of_memory import free_memory, is_out_of_memory
from library.training.saving.state import Progress, Stateful

if TYPE_CHECKING:
    from library.runtime.processes import Processes


class _Noted:
    """A progress as it was, with the states of the random generators. The losses of an epoch only grow, by one a step,
    so they are copied when they are needed."""

    def __init__(self, progress: Progress, due_left: bool, random: Any) -> None:  # noqa: FBT001 - a field of it
        self.progress = replace(progress, standings=dict(progress.standings), due_left=due_left)
        self.losses = len(progress.epoch_losses)
        self.random = random

    def whole(self) -> Progress:
        """The progress as it was."""
        return replace(self.progress, epoch_losses=self.progress.epoch_losses[: self.losses])


@dataclass
class Rescue:
    """What a run could be resumed from at this moment. `save(progress)` writes model and state, and returns the folder
    of the state; `random` holds the global random generators, which a state contains; `begin`: the step that the run
    began after. `all_alike` in a sharded run: whether all processes come there with the same text; None: one that
    writes can save alone."""

    processes: Processes
    save: Callable[[Progress], Path | None]
    random: Stateful
    warn: Callable[[str], None]
    begin: int
    all_alike: Callable[[str], bool] | None = None
    _resumable: _Noted | None = field(default=None, init=False)

    def remember(self, progress: Progress) -> None:
        """Note that the weights are those after this progress. What comes until the next call leaves them so."""
        self._resumable = _Noted(progress, progress.due_left, self.random.state_dict())

    def forget(self) -> None:
        """Note that the weights change now: until the next `remember` they belong to no progress."""
        self._resumable = None

    def complete(self, progress: Progress) -> None:
        """Note that more is known of this progress, if it is the one that was remembered last: losses were read
        late."""
        known = self._resumable
        if known is not None and known.progress.step == progress.step:
            self._resumable = _Noted(progress, known.progress.due_left, known.random)

    def putting_back(self) -> Callable[[], None]:
        """What puts back what is remembered now."""
        resumable = self._resumable

        def put_back() -> None:
            self._resumable = resumable

        return put_back

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Save if an error is raised in this context. It goes on; a UserError says how to resume.

        Nothing is saved, and that is said, if the weights are between two steps or not finite; nothing new if no step
        was finished.
        """
        try:
            yield
        except Exception as error:
            if not self._is_to_save(error):
                raise
            if is_out_of_memory(error):
                free_memory(error)
            told, mistakes = self._save()
            if not self.processes.is_writer:
                raise
            if not isinstance(error, UserError):
                self.warn("\n".join([told, *map(str, mistakes)]).strip())
                raise
            *others, last = error.mistakes
            if told:
                last = Mistake(last.what, "; ".join(filter(None, (last.remedy, told))))
            raise UserError((*others, last, *mistakes)) from error

    def _is_to_save(self, error: Exception) -> bool:
        """Whether this process saves, alone or with all others. Of a failure of another process it hears by a broken
        connection: that is no error of its own."""
        if self.all_alike is None:
            return self.processes.is_writer
        step = None if self._resumable is None else self._resumable.progress.step
        what = [str(mistake) for mistake in error.mistakes] if isinstance(error, UserError) else str(error)
        return self.all_alike(repr((type(error).__name__, what, step)))

    def _save(self) -> tuple[str, tuple[Mistake, ...]]:
        """What was saved, or why nothing was, as words for the user, and the mistakes of saving."""
        if self._resumable is None:
            return "the step was cut off in its middle, so only what was saved before it can be continued", ()
        progress = self._resumable.whole()
        if progress.step == self.begin:
            return "", ()
        self.random.load_state_dict(self._resumable.random)
        try:
            folder = self.save(progress)
        except UserError as error:
            return "", tuple(error.mistakes)
        if folder is None:  # the writer knows it
            return "", ()
        return f"model and state are saved as of step {progress.step}: continue with --resume {quoted(folder)}", ()
