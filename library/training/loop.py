"""The training loop: epochs, gradient accumulation, steps, and calls to what is due after a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from library.data.order import BatchRequest, EpochOrder
from library.runtime.signals import StoppedAside
from library.training.saving.state import Progress
from library.training.steps import Steps, mean
from library.training.trainable import Trainable, freeze_finished

if TYPE_CHECKING:
    from library.data.batch import Batch
    from library.training.plan.duration import Duration
    from library.training.run import Run


class DueCall(Protocol):
    """Saves, draws or validates if it is due. Called after every optimizer step, and after every complete epoch with
    `epoch_ended`."""

    def __call__(self, progress: Progress, *, epoch_ended: bool) -> None:
        """`progress` counts the steps that are finished."""


@dataclass
class Loop:
    """Everything that the loop uses.

    `batches(requests)` loads the requested batches and yields each with its request. `steps` takes optimizer steps.
    `due` are called in this order, on all processes. The numbers of steps are read before anything is due by the number
    of steps (`is_due`), at the end of an epoch and of the run, and if it is to stop. `is_over(progress)`: whether to
    end before the last step, as the writing process knows after `due`; None: never.
    """

    run: Run
    trainable: Trainable
    steps: Steps
    order: EpochOrder
    batches: Callable[[Iterable[BatchRequest]], Iterator[tuple[BatchRequest, Batch]]]
    due: Sequence[DueCall]
    duration: Duration
    is_due: Callable[[Progress], bool] = lambda progress: True
    is_over: Callable[[Progress], bool] | None = None

    @property
    def stopped(self) -> bool:
        """Whether the loop ended because the run is to stop."""
        return self.steps.stopped

    def train(self, progress: Progress) -> Progress:
        """Train from `progress` to the last step, or to the one that is finished when the run is to stop. Raises
        UserError for a loss that is not finite, and Unreadable if too many files cannot be read."""
        try:
            return self._train(progress)
        except Exception:
            self.steps.read_at_the_end(progress)
            raise

    def _train(self, progress: Progress) -> Progress:
        # Start where the run, or the run that is resumed, stopped.
        freeze_finished(self.trainable.parts, progress.step)
        ends_epoch = progress.window == self.duration.steps_per_epoch and not progress.due_left
        if self._is_last(progress) and not (progress.due_left or ends_epoch):
            return progress
        if ends_epoch:
            goes_on = self._end_epoch(progress)  # the state was saved between last step and end of epoch
        else:
            self._begin_epoch(progress)
            goes_on = not progress.due_left or self._after_step(progress)
        if not goes_on or self._is_last(progress):
            return progress

        # Train on all batches up to the end of the run: workers load the next epoch while this one ends.
        window = self.steps.begin_window(progress)
        for request, batch in self.batches(self._requests(progress.epoch, progress.window)):
            if request.epoch > progress.epoch:
                raise RuntimeError(f"a batch of epoch {request.epoch} came in epoch {progress.epoch}")

            # Accumulate gradients until the window is complete.
            self.steps.add(request, batch, window, progress.step)
            if not request.last_of_window:
                continue

            # Step, then save, draw and validate if due, and end the epoch.
            self.steps.take(window, progress)
            if not self._after_step(progress):
                break

            # End the run.
            if self._is_last(progress):
                break
            window = self.steps.begin_window(progress)
        return progress

    def _requests(self, epoch: int, window: int) -> Iterator[BatchRequest]:
        """All remaining batches of this process, from this window of this epoch on."""
        rank, world = self.run.processes.rank, self.run.processes.world
        yield from self.order.requests(epoch, window, rank, world)
        for later in range(epoch + 1, self.duration.epochs + 1):
            yield from self.order.requests(later, 0, rank, world)

    def _after_step(self, progress: Progress) -> bool:
        """Read what is to be read, do what is due after a step, and end the epoch after its last. False: the run is to
        stop, and leaves that to the one that resumes it."""
        if self.steps.late.pending:
            if not self._is_time_to_read(progress):
                return True  # nothing is due
            self.steps.read(progress)
        progress.due_left = False  # in the states that are saved now
        if self.steps.stopped or not self._call_due(progress, epoch_ended=False):
            progress.due_left = True
            return False
        if progress.window == self.duration.steps_per_epoch or self._is_last(progress):
            return self._end_epoch(progress)
        return True

    def _call_due(self, progress: Progress, *, epoch_ended: bool) -> bool:
        """Whether all that is due was done: not if the run is to stop meanwhile."""
        try:
            with self.run.console.pause():
                for call in self.due:
                    call(progress, epoch_ended=epoch_ended)
        except StoppedAside:
            self.steps.stopped = True
        return not self.steps.stopped

    def _begin_epoch(self, progress: Progress) -> None:
        self.trainable.epoch_begins()
        self.run.say(f"epoch {progress.epoch}/{self.duration.epochs}")

    def _is_time_to_read(self, progress: Progress) -> bool:
        """Whether all that is pending is to be read after this step. All ranks get the same answer."""
        return (
            self.steps.stopped
            or progress.step % self.steps.late.interval == 0
            or progress.step >= self.duration.steps
            or progress.window == self.duration.steps_per_epoch
            or self.steps.stops_a_part(progress.step + 1)
            or self.is_due(progress)
        )

    def _end_epoch(self, progress: Progress) -> bool:
        """Log the mean loss; after a complete epoch also call what is due, and begin the next one. False: see
        `_after_step`."""
        if progress.epoch_losses and self.run.processes.is_writer:
            self.run.log({self.trainable.tags.epoch: mean(progress.epoch_losses)}, progress.epoch)
            self.run.say(epoch_loss(progress, self.duration.steps_per_epoch))
        if progress.window < self.duration.steps_per_epoch:
            return True
        if not self._call_due(progress, epoch_ended=True):
            return False
        progress.epoch += 1
        progress.window = 0
        progress.last_epoch_losses = progress.epoch_losses
        progress.epoch_losses = []
        if not self._is_last(progress):
            self._begin_epoch(progress)
        return True

    def _is_last(self, progress: Progress) -> bool:
        """Whether the run ends after this step. All ranks call it, and get the same answer."""
        if progress.step >= self.duration.steps or self.is_over is None or self.steps.late.pending:
            return progress.step >= self.duration.steps
        is_over = self.run.processes.is_writer and self.is_over(progress)
        return bool(self.run.processes.sum(torch.tensor(float(is_over))))


def epoch_loss(progress: Progress, steps_per_epoch: int) -> str:
    """The mean loss of an epoch, also of an incomplete one, and that of the epoch before."""
    count = len(progress.epoch_losses)
    text = f"loss of epoch {progress.epoch}: {mean(progress.epoch_losses):.4f}"
    if count < steps_per_epoch:
        text += f" (over {count} of {steps_per_epoch} steps)"
    if progress.last_epoch_losses:
        text += f", epoch {progress.epoch - 1}: {mean(progress.last_epoch_losses):.4f}"
    return text
