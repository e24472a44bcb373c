"""The training loop: epochs, accumulation windows, the optimiser step, what is logged, and what happens every N
steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from library.data.order import BatchRequest, EpochOrder
from library.objective.loss import Term, sum_terms, window_share
from library.options.mistakes import Mistake, UserError
from library.training.optim.clipping import clip_gradients
from library.training.saving.state import Progress
from library.training.trainable import Trainable, freeze_finished, groups_of, trainable_parameters
from library.training.weight_averaging import Weights

if TYPE_CHECKING:
    from library.data.batch import Batch
    from library.runtime.processes import Processes
    from library.training.plan.duration import Duration
    from library.training.run import Run


@dataclass
class Window:
    """What is kept of the micro-batches of one optimiser step: their shares of its loss, those of each term where there
    are several, and for the message about a loss that is not finite the images with the losses of their samples."""

    shares: list[torch.Tensor] = field(default_factory=list)
    terms: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    samples: list[tuple[tuple[str, ...], torch.Tensor]] = field(default_factory=list)


@dataclass
class Loop:
    """Everything the loop touches. Built by the session, used by `run`.

    `losses(batch)` gives the terms of the loss, each a float32 tensor (B,), timestep weights included: the same terms
    for every batch of a run, with zeros for samples that have no part in one.
    `batches(requests)` turns requests into batches, each with its request. Each of `due` is called with (progress,
    epoch_ended) after every optimiser step and after every whole epoch, in this order, by the process that writes.
    """

    run: Run
    trainable: Trainable
    optimizer: Any
    schedule: Any
    weights: Weights
    order: EpochOrder
    losses: Callable[[Batch], Sequence[Term]]
    batches: Callable[[Iterable[BatchRequest]], Iterator[tuple[BatchRequest, Batch]]]
    due: Sequence[Callable[[Progress, bool], None]]
    duration: Duration
    max_grad_norm: float

    def train(self, progress: Progress) -> Progress:
        """Train from `progress` to the last step. Raises UserError on a loss that is not finite."""
        freeze_finished(self.trainable.parts, progress.step)
        if progress.step >= self.duration.steps:
            return progress
        if progress.window == self.duration.steps_per_epoch:  # saved after an epoch's last step, before its end
            self._end_epoch(progress)
        else:
            self._begin_epoch(progress)
        # all micro-batches still to come, so that those of the next epoch are prepared while this one ends; those of
        # one optimiser step are a window
        window = Window()
        for request, batch in self.batches(self._requests(progress.epoch, progress.window)):
            if request.epoch > progress.epoch:
                raise RuntimeError(f"a batch of epoch {request.epoch} came in epoch {progress.epoch}")
            self._backward(request, batch, window)
            if not request.last_of_window:
                continue
            self._step(window, progress)
            self._call_due(progress, epoch_ended=False)
            window = Window()
            if progress.window == self.duration.steps_per_epoch or progress.step >= self.duration.steps:
                self._end_epoch(progress)
            if progress.step >= self.duration.steps:
                break
        return progress

    def _requests(self, epoch: int, window: int) -> Iterator[BatchRequest]:
        """All that the run still asks for, from this window of this epoch on."""
        rank, world = self.run.processes.rank, self.run.processes.world
        yield from self.order.requests(epoch, window, rank, world)
        for later in range(epoch + 1, self.duration.epochs + 1):
            yield from self.order.requests(later, 0, rank, world)

    def _call_due(self, progress: Progress, epoch_ended: bool) -> None:
        for call in self.due if self.run.processes.is_writer else ():
            call(progress, epoch_ended)

    def _begin_epoch(self, progress: Progress) -> None:
        self.trainable.epoch_begins()
        self.run.say(f"epoch {progress.epoch}/{self.duration.epochs}")

    def _backward(self, request: BatchRequest, batch: Batch, window: Window) -> None:
        """Add the gradients of a micro-batch, weighted by its share of the whole step."""
        self.trainable.step_begins()
        with self.run.accelerator.autocast():
            terms = self.losses(batch)
            losses = sum_terms(terms)
        weights = batch.weights.to(losses.device)
        if not request.is_counted:
            weights = torch.zeros_like(weights)
        share = window_share(losses, weights, request.window_samples)
        self.run.accelerator.backward(share)
        window.shares.append(share.detach())
        for term in terms if len(terms) > 1 else ():
            part = window_share(term.losses.detach(), weights, request.window_samples)
            window.terms.setdefault(term.name, []).append(part)
        if request.is_counted:
            window.samples.append((batch.paths, losses.detach()))

    def _step(self, window: Window, progress: Progress) -> None:
        """One optimiser step with the gradients of its window, and what is said of it. All ranks see the same loss, so
        one that is not finite stops all of them, before anything is changed."""
        loss = self._whole(window.shares)
        if not math.isfinite(loss):
            raise not_finite(window, progress, self.run.processes)
        terms = {name: self._whole(shares) for name, shares in window.terms.items()}
        if self.max_grad_norm > 0:
            self.run.accelerator.unscale_gradients()
            clip_gradients(trainable_parameters(self.trainable.parts), self.max_grad_norm)
        self.optimizer.step()
        measured = self.trainable.step_ended()
        if not self.run.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
            self.weights.update()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.window += 1
        progress.epoch_losses.append(loss)
        for part in freeze_finished(self.trainable.parts, progress.step):
            self.run.say(f"step {progress.step}: {part.name} is trained no further")
        if self.run.processes.is_writer:
            values = {**self._losses(loss, terms, progress), **self._learning_rates(), **measured}
            self.run.log(values, progress.step)
        self.run.console.step_done(_mean(progress.epoch_losses))

    def _whole(self, shares: Sequence[torch.Tensor]) -> float:
        """The loss of a window by the shares of its micro-batches on all ranks."""
        return float(self.run.processes.sum(torch.as_tensor(sum(shares))))

    def _losses(self, loss: float, terms: Mapping[str, float], progress: Progress) -> dict[str, float]:
        """The loss of a step, its terms where there are several and, where the recipe's users look for it, the mean
        over as many steps as an epoch has."""
        tags = self.trainable.tags
        found = {tags.step: loss, **{f"loss/{name}": value for name, value in terms.items()}}
        if tags.average:
            found[tags.average] = _mean(
                progress.epoch_losses + progress.last_epoch_losses[len(progress.epoch_losses) :]
            )
        return found

    def _learning_rates(self) -> dict[str, float]:
        """The rates as trackers know them: lr/unet, lr/text_encoder1; with D-Adaptation and Prodigy also what they
        adapt to."""
        rates: dict[str, float] = {}
        names = [group.name for group in groups_of(self.trainable.parts)]
        for name, group, rate in zip(names, self.optimizer.param_groups, self.schedule.get_last_lr(), strict=False):
            rates[f"lr/{name}"] = float(rate)
            if "d" in group:
                rates[f"lr/d*lr/{name}"] = float(group["d"]) * float(group["lr"])
        return rates

    def _end_epoch(self, progress: Progress) -> None:
        if progress.epoch_losses and self.run.processes.is_writer:
            self.run.log({self.trainable.tags.epoch: _mean(progress.epoch_losses)}, progress.epoch)
        if progress.window < self.duration.steps_per_epoch:
            return
        self._call_due(progress, epoch_ended=True)
        progress.epoch += 1
        progress.window = 0
        progress.last_epoch_losses = progress.epoch_losses
        progress.epoch_losses = []
        if progress.step < self.duration.steps:
            self._begin_epoch(progress)


def not_finite(window: Window, progress: Progress, processes: Processes) -> UserError:
    """The message for a loss that is NaN or infinite: step, files of all ranks, and what usually helps."""
    own = [
        f"{path} ({value:g})"
        for paths, losses in window.samples
        for path, value in zip(paths, losses.tolist(), strict=True)
        if not math.isfinite(value)
    ]
    files = [file for each in processes.gather(own) for file in each]
    named = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
    what = f"the loss is not finite at step {progress.step + 1} (epoch {progress.epoch}): {named or 'the weighted sum'}"
    remedy = (
        "nothing was written with it. What usually helps: a lower --learning_rate or a warm-up (--lr_warmup_steps), "
        "--mixed_precision bf16 in place of fp16, --no_half_vae, --max_grad_norm 1; "
        "--resume goes on from the last saved state"
    )
    return UserError((Mistake(what, remedy),))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
