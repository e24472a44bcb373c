"""The training loop: epochs, gradient accumulation, optimizer steps, logging, and calls to what is due after a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from library.data.order import BatchRequest, EpochOrder
from library.objective.loss import Term, sum_of_members, window_share
from library.runtime.signals import StoppedAside
from library.training.averaging.weights import Weights
from library.training.backward import Backward
from library.training.gradients import Gradients
from library.training.nonfinite import NonFinite, Samples
from library.training.saving.state import Progress
from library.training.trainable import Trainable, all_groups, freeze_finished, trainable_parameters

if TYPE_CHECKING:
    from library.data.batch import Batch, Unread
    from library.training.left_out import LeftOut
    from library.training.plan.duration import Duration
    from library.training.run import Run
    from library.training.saving.rescue import Rescue


class DueCall(Protocol):
    """Saves, draws or validates if it is due. Called after every optimizer step, and after every complete epoch with
    `epoch_ended`."""

    def __call__(self, progress: Progress, *, epoch_ended: bool) -> None:
        """`progress` counts the steps that are finished."""


@dataclass
class Window:
    """The batches of one optimizer step: `shares` of the step's loss, one per batch, the same for each term where there
    are several, the sum and number of the losses of each term with members (`drifts`), all samples, for the message
    about a loss that is not finite, and the samples that could not be read. `size` is the number of samples on all
    ranks."""

    shares: list[torch.Tensor] = field(default_factory=list)
    terms: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    drifts: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    samples: list[Samples] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)
    size: int = 0


@dataclass
class Loop:
    """Everything that the loop uses.

    `losses(batch, step)` returns the terms of the loss, each a float32 tensor (B,), timestep weights included; `step`
    is the number of finished optimizer steps. All batches of a step have the same terms; samples without one of them
    have zeros there.
    `batches(requests)` loads the requested batches and yields each with its request.
    `gradients` averages those of a window over all processes; `backward` computes them.
    `due` are called in this order, on all processes, and `record(step, loss)` after each step, on the writing process
    only. `measured()` returns further values of a step to log; all processes call it. `is_over(progress)`: whether to
    end before the last step, as the writing process knows after `due`; None: never. `rescue` knows what can be saved if
    an error comes. `stopped`: whether the loop ended because the run is to stop. `nonfinite` decides about steps whose
    loss or gradient is not finite, and names samples with the timesteps of the last batch, `timesteps()`.
    """

    run: Run
    trainable: Trainable
    optimizer: Any
    schedule: Any
    weights: Weights
    order: EpochOrder
    left_out: LeftOut
    rescue: Rescue
    nonfinite: NonFinite
    losses: Callable[[Batch, int], Sequence[Term]]
    batches: Callable[[Iterable[BatchRequest]], Iterator[tuple[BatchRequest, Batch]]]
    due: Sequence[DueCall]
    duration: Duration
    backward: Backward
    gradients: Gradients = field(default_factory=Gradients)
    record: Callable[[int, float], None] = lambda step, loss: None
    measured: Callable[[], Mapping[str, float]] = dict
    is_over: Callable[[Progress], bool] | None = None
    stopped: bool = False
    timesteps: Callable[[], torch.Tensor | None] = lambda: None

    def train(self, progress: Progress) -> Progress:
        """Train from `progress` to the last step, or to the one that is finished when the run is to stop. Raises
        UserError for a loss that is not finite, and Unreadable if too many files cannot be read."""
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
        window = self._begin_window(progress)
        for request, batch in self.batches(self._requests(progress.epoch, progress.window)):
            if request.epoch > progress.epoch:
                raise RuntimeError(f"a batch of epoch {request.epoch} came in epoch {progress.epoch}")

            # Accumulate gradients until the window is complete.
            self._backward(request, batch, window, progress.step)
            if not request.last_of_window:
                continue

            # Step, then save, draw and validate if due, and end the epoch.
            self._step(window, progress)
            if not self._after_step(progress):
                break

            # End the run.
            if self._is_last(progress):
                break
            window = self._begin_window(progress)
        return progress

    def _requests(self, epoch: int, window: int) -> Iterator[BatchRequest]:
        """All remaining batches of this process, from this window of this epoch on."""
        rank, world = self.run.processes.rank, self.run.processes.world
        yield from self.order.requests(epoch, window, rank, world)
        for later in range(epoch + 1, self.duration.epochs + 1):
            yield from self.order.requests(later, 0, rank, world)

    def _after_step(self, progress: Progress) -> bool:
        """Do what is due after a step, and end the epoch after its last. False: the run is to stop, and leaves that to
        the one that resumes it."""
        progress.due_left = False  # in the states that are saved now
        if self.stopped or not self._call_due(progress, epoch_ended=False):
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
            self.stopped = True
        return not self.stopped

    def _begin_epoch(self, progress: Progress) -> None:
        self.trainable.epoch_begins()
        self.run.say(f"epoch {progress.epoch}/{self.duration.epochs}")

    def _begin_window(self, progress: Progress) -> Window:
        # else a resumed run begins with the first window that could not be read, or was not finite
        if not (self.left_out.nothing_read or progress.nonfinite):
            self.rescue.remember(progress)
        return Window()

    def _backward(self, request: BatchRequest, batch: Batch, window: Window, step: int) -> None:
        """Add the gradients of a batch, weighted by its share of the step's samples."""
        self.trainable.step_begins()
        with self.gradients.of_batch(last=request.last_of_window):
            with self.run.accelerator.autocast():
                losses, terms = self.gradients.losses(self.losses, batch, step)
            weights = batch.weights.to(losses.device)
            if not request.is_counted:
                weights = torch.zeros_like(weights)
            share = window_share(losses, weights, request.window_samples)
            self.backward.add(share * self.gradients.factor)
        window.shares.append(share.detach())
        for term in terms if len(terms) > 1 else ():
            part = window_share(term.weighted.detach(), weights, request.window_samples)
            window.terms.setdefault(term.name, []).append(part)
        for term in terms:
            if term.members is not None:
                sums = sum_of_members(term.losses.detach(), term.members.to(losses.device) & (weights > 0))
                window.drifts.setdefault(term.name, []).append(sums)
        if request.is_counted:
            window.samples.append(Samples(batch.paths, losses.detach(), self.timesteps()))
            window.unread += batch.unread
        window.size = request.window_samples

    def _step(self, window: Window, progress: Progress) -> None:
        """Take one optimizer step with the gradients of a window, and log it."""
        # Leave out the samples that could not be read: what is left is divided by its own number.
        read = self.left_out.count(window.unread, window.size, progress.step + 1)
        if not read:
            self.backward.clear()
            self._count_step(progress)
            return
        factor = window.size / read

        # Check loss and gradients. All ranks see the same values, so all of them skip the step, or stop, with weights
        # and optimizer unchanged. With them they learn whether one of them is to stop after this step.
        norm = self.backward.measure(trainable_parameters(self.trainable.parts), factor)
        summed, is_finite, self.stopped = self._sum_and_check(window.shares, norm)
        loss = summed * factor
        if not (math.isfinite(loss) and is_finite):
            self._skip("gradient" if math.isfinite(loss) else "loss", window, progress)
            return
        logged = {f"loss/{name}": self._sum_over_ranks(shares) * factor for name, shares in window.terms.items()}
        means = {f"drift/{name}": self._mean_over_ranks(sums) for name, sums in window.drifts.items()}
        logged |= {name: mean for name, mean in means.items() if not math.isnan(mean)}

        # Clip the gradients, update weights, learning rates and averaged weights.
        self.rescue.forget()
        if not self.backward.finish(norm):
            self.nonfinite.cut_off(window.samples, progress)
        self.optimizer.step()
        measured = {**self.measured(), **self.trainable.step_ended()}
        if self.run.accelerator.optimizer_step_was_skipped:
            self.rescue.remember(progress)
            self.nonfinite.overflowed(self.run.accelerator.scaler, window.samples, progress)
        else:
            self.schedule.step()
            self.weights.update()
            self.nonfinite.stepped(progress)
        self.backward.clear()

        # Count the step, and log it.
        progress.epoch_losses.append(loss)
        self._count_step(progress)
        self.rescue.remember(replace(progress, due_left=True))
        if self.run.processes.is_writer:
            values = {**self._logged_losses(loss, progress), **logged, **self._learning_rates(), **measured}
            self.run.log(values, progress.step)
            self.record(progress.step, loss)

    def _count_step(self, progress: Progress) -> None:
        """Count a step, and freeze the parts that stop here."""
        progress.step += 1
        progress.window += 1
        for part in freeze_finished(self.trainable.parts, progress.step):
            self.run.say(f"step {progress.step}: training of {part.name} stops")
            self.gradients.parts_stopped()
        self.run.console.count_step(_mean(progress.epoch_losses))

    def _skip(self, what: str, window: Window, progress: Progress) -> None:
        """Leave out a step whose loss or gradient is not finite; it counts. Raises UserError if it is one too many."""
        self.nonfinite.skip(what, window.samples, progress)
        self.backward.clear()
        self._count_step(progress)

    def _sum_and_check(self, shares: Sequence[torch.Tensor], norm: torch.Tensor | None) -> tuple[float, bool, bool]:
        """The loss of a window, whether the norm of the gradients is finite on all ranks, and whether any rank is to
        stop, from one collective and one reading of the device."""
        loss = torch.as_tensor(sum(shares))
        checked = torch.zeros_like(loss) if norm is None else norm.to(loss) * 0  # NaN if it is infinite
        stop = loss.new_tensor(float(bool(self.run.stop)))
        summed, finite, stops = self.run.processes.sum(torch.stack((loss, checked, stop))).tolist()
        return summed, finite == 0, stops > 0

    def _sum_over_ranks(self, shares: Sequence[torch.Tensor]) -> float:
        """The loss of a window: the sum of the shares of its batches on all ranks."""
        return float(self.run.processes.sum(torch.as_tensor(sum(shares))))

    def _mean_over_ranks(self, sums: Sequence[torch.Tensor]) -> float:
        """The mean of values whose sums and numbers are given by batch, over all ranks; NaN of no values."""
        total, count = self.run.processes.sum(torch.stack([*sums]).sum(0)).tolist()
        return float(total / count) if count else math.nan

    def _logged_losses(self, loss: float, progress: Progress) -> dict[str, float]:
        """The loss of a step, and, for recipes whose users know it, the moving average over as many steps as an epoch
        has."""
        tags = self.trainable.tags
        values = {tags.step: loss}
        if tags.average:
            values[tags.average] = _mean(
                progress.epoch_losses + progress.last_epoch_losses[len(progress.epoch_losses) :]
            )
        return values

    def _learning_rates(self) -> dict[str, float]:
        """Learning rates under the names of kohya's scripts (lr/unet, lr/text_encoder1); for D-Adaptation and Prodigy
        also the effective ones, d * lr."""
        rates: dict[str, float] = {}
        names = [group.name for group in all_groups(self.trainable.parts)]
        for name, group, rate in zip(names, self.optimizer.param_groups, self.schedule.get_last_lr(), strict=False):
            rates[f"lr/{name}"] = float(rate)
            if "d" in group:
                rates[f"lr/d*lr/{name}"] = float(group["d"]) * float(group["lr"])
        return rates

    def _end_epoch(self, progress: Progress) -> bool:
        """Log the mean loss; after a complete epoch also call what is due, and begin the next one. False: see
        `_after_step`."""
        if progress.epoch_losses and self.run.processes.is_writer:
            self.run.log({self.trainable.tags.epoch: _mean(progress.epoch_losses)}, progress.epoch)
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
        if progress.step >= self.duration.steps or self.is_over is None:
            return progress.step >= self.duration.steps
        is_over = self.run.processes.is_writer and self.is_over(progress)
        return bool(self.run.processes.sum(torch.tensor(float(is_over))))


def epoch_loss(progress: Progress, steps_per_epoch: int) -> str:
    """The mean loss of an epoch, also of an incomplete one, and that of the epoch before."""
    count = len(progress.epoch_losses)
    text = f"loss of epoch {progress.epoch}: {_mean(progress.epoch_losses):.4f}"
    if count < steps_per_epoch:
        text += f" (over {count} of {steps_per_epoch} steps)"
    if progress.last_epoch_losses:
        text += f", epoch {progress.epoch - 1}: {_mean(progress.last_epoch_losses):.4f}"
    return text


def _mean(values: Sequence[float]) -> float:
    """The mean; NaN of no values."""
    return math.fsum(values) / len(values) if values else math.nan
