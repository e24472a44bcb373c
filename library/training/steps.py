"""Optimizer steps: gradients by batch, the numbers of a step, its update, and what is logged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from library.data.order import BatchRequest
from library.objective.loss import Term, sum_of_members, window_share
from library.runtime.transfers import upload
from library.training.averaging.weights import Weights
from library.training.backward import Backward
from library.training.gradients import Averaging, Gradients
from library.training.late import Late, Pending, left_out_if
from library.training.nonfinite import NonFinite, Samples
from library.training.running_means import RunningMeans
from library.training.saving.state import Progress
from library.training.trainable import Trainable, all_groups, freeze_finished, trainable_parameters
from library.training.window import StepNumbers, StepRow, Window

if TYPE_CHECKING:
    from library.data.batch import Batch
    from library.training.left_out import LeftOut
    from library.training.run import Run
    from library.training.saving.rescue import Rescue


@dataclass
class Steps:
    """Takes the optimizer steps of a run.

    `losses(batch, step)` returns the terms of the loss, each a float32 tensor (B,), timestep weights included; `step`
    is the number of finished optimizer steps. All batches of a step have the same terms; samples without one of them
    have zeros there.
    `gradients` averages those of a window over all processes; `backward` computes them.
    `record(step, loss)` is called for each step, on the writing process only. `measured()` returns the sum and the
    number, (2,), of further values of a step to log, the same names on all ranks. `rescue` knows what can be saved if
    an error comes. `stopped`: whether the run is to stop after this step. `nonfinite` decides about steps whose loss or
    gradient is not finite, and names samples with the timesteps of the last batch, `timesteps()`. `late`: what is read
    late.
    """

    run: Run
    trainable: Trainable
    optimizer: Any
    schedule: Any
    weights: Weights
    left_out: LeftOut
    rescue: Rescue
    nonfinite: NonFinite
    losses: Callable[[Batch, int], Sequence[Term]]
    backward: Backward
    gradients: Averaging = field(default_factory=Gradients)
    record: Callable[[int, float], None] = lambda step, loss: None
    measured: Callable[[], Mapping[str, torch.Tensor]] = dict
    timesteps: Callable[[], torch.Tensor | None] = lambda: None
    late: Late = field(default_factory=Late)
    stopped: bool = False
    _means: RunningMeans = field(default_factory=RunningMeans, init=False)
    _trained: list[torch.nn.Parameter] | None = field(default=None, init=False)  # None: to be listed again
    _names: list[str] | None = field(default=None, init=False)  # of the groups with a learning rate

    def begin_window(self, progress: Progress) -> Window:
        """The window of the next step, still empty."""
        # else a resumed run begins with the first window that could not be read, or was not finite
        if not (self.left_out.nothing_read or progress.nonfinite):
            self.rescue.remember(progress)
        return Window()

    def add(self, request: BatchRequest, batch: Batch, window: Window, step: int) -> None:
        """Add the gradients of a batch, weighted by its share of the step's samples."""
        self.trainable.step_begins()
        with self.gradients.of_batch(last=request.last_of_window):
            with self.run.accelerator.autocast():
                losses, terms = self.gradients.losses(self.losses, batch, step)
            weights = upload(batch.weights, losses.device)
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
                members = upload(term.members, losses.device)
                sums = sum_of_members(term.losses.detach(), members & (weights > 0))
                window.drifts.setdefault(term.name, []).append(sums)
        if request.is_counted:
            window.samples.append(Samples(batch.paths, losses.detach(), self.timesteps()))
            window.unread += batch.unread
        window.size = request.window_samples
        if self.late.interval > 1 and not window.again:
            window.batches.append((request, batch))

    def take(self, window: Window, progress: Progress) -> None:
        """Take one optimizer step with the gradients of a window, and log it, or leave both for later."""
        # The numbers of the step on all ranks: with them they learn whether one of them is to stop after this step.
        if self._trained is None:
            self._trained = trainable_parameters(self.trainable.parts)
        norm = self.backward.measure(self._trained)
        row = window.row(norm, self.measured(), stop=bool(self.run.stop))
        row = replace(row, values=self.run.processes.sum(row.values))

        # Where parts stop, all must be known before: the step that they are frozen after is read at once.
        if self.late.interval == 1 or window.again or self.stops_a_part(progress.step + 1):
            self._step_at_once(window, row.read(row.values.tolist()), norm, progress)
        else:
            self._step_unread(window, row, norm, progress)

    def _step_at_once(
        self, window: Window, numbers: StepNumbers, norm: torch.Tensor | None, progress: Progress
    ) -> None:
        """Take a step whose numbers are known. All ranks see the same ones, so all of them skip the step, or stop, with
        weights and optimizer unchanged."""
        # Leave out the samples that could not be read: what is left is divided by its own number.
        self.stopped = numbers.stops
        read = self.left_out.count(window.unread, window.size, progress.step + 1, anywhere=numbers.unread)
        if not read:
            self.backward.clear()
            self._count_step(progress, window)
            return
        factor = window.size / read
        loss = numbers.loss * factor
        if not (math.isfinite(loss) and numbers.has_finite_norm):
            self._skip("gradient" if math.isfinite(loss) else "loss", window, progress)
            return

        # Update weights, learning rates and averaged weights.
        self._update(norm, factor, window, progress)
        measured = self.trainable.step_ended()
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
        self._count_step(progress, window)
        self.rescue.remember(replace(progress, due_left=True))
        self._log(progress.step, loss, numbers, factor, {**self._learning_rates(), **measured}, progress)

    def _step_unread(self, window: Window, row: StepRow, norm: torch.Tensor | None, progress: Progress) -> None:
        """Take a step whose numbers are read later: the device leaves it out if it is not ordinary."""
        put_back = self._putting_back(progress)
        held = self.late.hold(row)
        self._update(norm, 1, window, progress, held)
        self.trainable.step_ended()
        self.schedule.step()
        self.weights.update(held)
        self.backward.clear()
        self._count_step(progress, window)
        self.rescue.remember(replace(progress, due_left=True))
        self.late.pending.append(Pending(progress.step, window, row, self._learning_rates(), put_back))
        self.stopped = bool(self.run.stop) and self.run.processes.world == 1  # several agree when they read

    def _update(
        self,
        norm: torch.Tensor | None,
        factor: float,
        window: Window,
        progress: Progress,
        held: torch.Tensor | None = None,
    ) -> None:
        """Scale and clip the gradients, and change the weights, unless `held` on the device is 1. `norm`: that of the
        gradients as they are."""
        self.rescue.forget()
        if not self.backward.finish(norm, factor):
            self.nonfinite.cut_off(window.samples, progress)
        with left_out_if(held, self.weights.optimizer):
            self.optimizer.step()

    def _count_step(self, progress: Progress, window: Window) -> None:
        """Count a step, and freeze the parts that stop here."""
        progress.step += 1
        progress.window += 1
        for part in freeze_finished(self.trainable.parts, progress.step):
            self.run.say(f"step {progress.step}: training of {part.name} stops")
            self.gradients.parts_stopped()
            self._trained = None
        if not window.again:  # counted before
            self.run.console.count_step(self._means.of_epoch(progress.epoch_losses))

    def stops_a_part(self, step: int) -> bool:
        """Whether the training of a part ends with this step."""
        return any(part.stop_after == step for part in self.trainable.parts)

    def _skip(self, what: str, window: Window, progress: Progress) -> None:
        """Leave out a step whose loss or gradient is not finite; it counts. Raises UserError if it is one too many."""
        self.nonfinite.skip(what, window.samples, progress)
        self.backward.clear()
        self._count_step(progress, window)

    def read(self, progress: Progress) -> None:
        """Read what is pending. After this, all is as if each step had been read at once."""
        read = self.late.read()
        for place, (step, numbers) in enumerate(read):
            if numbers.is_ordinary:
                self._log_late(step, numbers, progress)
                continue
            step.put_back()
            for later, _ in read[place:]:
                window = self.begin_window(progress)
                window.again = True
                for request, batch in later.window.batches:
                    self.add(request, batch, window, progress.step)
                self.take(window, progress)
            return
        self.rescue.complete(progress)

    def read_at_the_end(self, progress: Progress) -> None:
        """Read what is pending when an error ends the run, so that what is saved then is whole."""
        if not self.late.pending:
            return
        try:
            for step, numbers in self.late.read():
                if not numbers.is_ordinary:
                    step.put_back()
                    break
                self._log_late(step, numbers, progress)
        except Exception:  # noqa: BLE001 - the device itself may have failed: the first error is the one to tell
            self.rescue.forget()
        else:
            self.rescue.complete(progress)

    def _log_late(self, step: Pending, numbers: StepNumbers, progress: Progress) -> None:
        self.stopped = self.stopped or numbers.stops
        self.left_out.nothing_read = False
        self.nonfinite.stepped(progress)
        progress.epoch_losses.append(numbers.loss)
        self._log(step.step, numbers.loss, numbers, 1, step.rates, progress)

    def _log(
        self,
        step: int,
        loss: float,
        numbers: StepNumbers,
        factor: float,
        more: Mapping[str, float],
        progress: Progress,
    ) -> None:
        """Log what is known of a step. The losses are multiplied by `factor`."""
        if self.run.processes.is_writer:
            terms = {name: share * factor for name, share in numbers.terms.items()}
            self.run.log({**self._logged_losses(loss, progress), **terms, **numbers.means, **more}, step)
            self.record(step, loss)

    def _putting_back(self, progress: Progress) -> Callable[[], None]:
        """What puts everything that the host counts back to where it is now."""
        step, window = progress.step, progress.window
        schedule, groups = deepcopy(self.schedule.state_dict()), self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        weights, rescue = self.weights.putting_back(), self.rescue.putting_back()

        def put_back() -> None:
            progress.step, progress.window = step, window
            self.schedule.load_state_dict(schedule)
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            weights()
            rescue()

        return put_back

    def _logged_losses(self, loss: float, progress: Progress) -> dict[str, float]:
        """The loss of a step, and, for recipes whose users know it, the moving average over as many steps as an epoch
        has."""
        tags = self.trainable.tags
        values = {tags.step: loss}
        if tags.average:
            values[tags.average] = self._means.moving(progress.epoch_losses, progress.last_epoch_losses)
        return values

    def _learning_rates(self) -> dict[str, float]:
        """Learning rates under the names of kohya's scripts (lr/unet, lr/text_encoder1); for D-Adaptation and Prodigy
        also the effective ones, d * lr."""
        rates: dict[str, float] = {}
        if self._names is None:
            self._names = [group.name for group in all_groups(self.trainable.parts)]
        groups, last = self.optimizer.param_groups, self.schedule.get_last_lr()
        for name, group, rate in zip(self._names, groups, last, strict=False):
            rates[f"lr/{name}"] = float(rate)
            if "d" in group:
                rates[f"lr/d*lr/{name}"] = float(group["d"]) * float(group["lr"])
        return rates


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of no values."""
    return math.fsum(values) / len(values) if values else math.nan
