"""The validation loss: the loss on held-out images, with fixed timesteps and noise.

The loss of image i is computed at K timesteps, one from each of K equal parts of the trained range:

    t_ib = floor(low + (b + u_ib) / K (high - low)),   b = 0 .. K-1,   u_ib uniform in [0, 1)

with noise n_ib. Both are drawn from the file name and b alone: they are the same at every validation and in every run,
whatever the seed, the batch size or the other images. So only the model changes the value.
The loss is the mean squared error of the prediction, whatever the training loss is: without weights, masks or noise
offset, with the full caption, without random crops or mirroring. Latents are the posterior sample that a cache would
hold.

Every held-out image has a partner that is trained on, with the same t_ib and n_ib. The mean difference of the two
losses is the divergence: about 0 at first, it grows as images are memorised. (sd-scripts subtracts the moving average
of the training loss, which has other timesteps, weights and noise, so the difference has no meaning.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.data.dataset import TrainingDataset
from library.data.reading import ImageReader
from library.data.retries import Unreadable, read_one
from library.families.family import Conditioning
from library.messages import counted
from library.objective.objective import Draws, Objective, Predict
from library.runtime.progress import ProgressBar
from library.runtime.seeds import python_random, torch_generator
from library.training.isolated_eval import isolated_eval
from library.training.training_loss import TrainingLoss
from library.training.validation.plan import (
    TIMESTEPS,
    ValidationPlan,
    draw_name,
    group_into_batches,
    validation_caption,
)

if TYPE_CHECKING:
    from library.training.averaging.weights import Versions, Weights
    from library.training.inputs import LatentEncoder
    from library.training.plan.duration import Duration
    from library.training.run import Run
    from library.training.saving.state import Progress


@dataclass(frozen=True)
class Losses:
    """The losses of all pairs by timestep, (pairs, K) float64 on the CPU: of the held-out images and of their partners
    that are trained on."""

    held_out: Tensor
    trained: Tensor

    @property
    def average(self) -> float:
        """The mean loss of the held-out images."""
        return float(self.held_out.mean())

    @property
    def divergence(self) -> float:
        """The mean loss of the held-out images minus that of their partners."""
        return float((self.held_out - self.trained).mean())

    @property
    def error(self) -> float | None:
        """Standard error of the divergence over pairs; None for one pair."""
        by_pair = (self.held_out - self.trained).mean(1)
        return float(by_pair.std()) / math.sqrt(len(by_pair)) if len(by_pair) > 1 else None

    def __str__(self) -> str:
        count, trained = len(self.held_out), float(self.trained.mean())
        spread = "" if self.error is None else f" ± {self.error:.2g}"
        held_out = counted(count, "held-out image")
        return (
            f"validation loss {self.average:.4f} on {held_out}, {trained:.4f} on as many training images: "
            f"divergence {self.divergence:+.4f}{spread}"
        )


@dataclass
class Validation:
    """Computes the validation loss of a run. `plan` None: no images are held out, and it never does.

    `predict` and `objective` are the training's; of `objective` only process, prediction and timestep range are used.
    `conditioning(texts, sizes, scores)` encodes captions, which all have one length if `padded`.
    `sizes_and_scores(numbers)` and `latents(number)`, (C, h, w) float32 unscaled, are those of the reader's records;
    `scaled` scales latents for the backbone. `modules` are all modules of the forward pass, adapters included.
    `versions` of the weights are measured one after the other, and logged with their suffix.
    """

    plan: ValidationPlan | None
    reader: ImageReader
    objective: Objective[Conditioning]
    predict: Predict[Conditioning]
    conditioning: Callable[[list[str], Tensor, Tensor], Conditioning]
    sizes_and_scores: Callable[[Sequence[int]], tuple[Tensor, Tensor]]
    padded: bool
    latents: Callable[[int], Tensor]
    scaled: Callable[[Tensor], Tensor]
    device: torch.device
    modules: Sequence[nn.Module]
    steps: int
    steps_per_epoch: int
    log: Callable[[dict[str, float], int], None]
    say: Callable[[str], None]
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    versions: Versions = field(default_factory=lambda: {"": nullcontext})
    _last: tuple[int, dict[str, Losses]] | None = field(default=None, init=False)

    def due(self, progress: Progress, *, epoch_ended: bool) -> None:
        """Validate if due: see loop.DueCall. An incomplete last epoch counts as an epoch."""
        if not epoch_ended:
            self.after_step(progress.step)
        if epoch_ended or (progress.step >= self.steps and progress.window < self.steps_per_epoch):
            self.after_epoch(progress.epoch, progress.step)

    def after_step(self, step: int) -> None:
        """Validate if due after `step` optimizer steps."""
        if self.plan is not None and self.plan.every_n_steps and step % self.plan.every_n_steps == 0:
            self._validate(self.plan, "step", step, step)

    def after_epoch(self, epoch: int, step: int) -> None:
        """Validate if due at the end of `epoch` (from 1), after `step` optimizer steps."""
        if self.plan is not None and self.plan.every_n_epochs and epoch % self.plan.every_n_epochs == 0:
            self._validate(self.plan, "epoch", epoch, step)

    def _validate(self, plan: ValidationPlan, kind: str, at: int, step: int) -> None:
        """Log the losses under the names of `kind` (step, epoch). If both are due after one step, compute them once. If
        a file cannot be read, only this validation is lost."""
        if self._last is None or self._last[0] != step:
            try:
                self._last = step, {suffix: self.measure(plan, held) for suffix, held in self.versions.items()}
            except Unreadable as error:
                self.say(f"step {step}: no validation loss: {error.mistakes[0].what}")
                return
            for suffix, losses in self._last[1].items():
                self.say(f"step {step}{' with the EMA' if suffix else ''}: {losses}")
        for suffix, losses in self._last[1].items():
            self.log(dict(self._logged(kind, losses, suffix)), at)

    def _logged(self, kind: str, losses: Losses, suffix: str) -> Mapping[str, float]:
        """Log names and values: the first two names are sd-scripts', the others are averages by timestep range."""
        parts = zip(self._parts(), losses.held_out.mean(0).tolist(), strict=True)
        return {
            f"loss/validation/{kind}_average{suffix}": losses.average,
            f"loss/validation/{kind}_divergence{suffix}": losses.divergence,
            **{
                f"loss/validation/{kind}_average_t{low:03d}_{high - 1:03d}{suffix}": value
                for (low, high), value in parts
            },
        }

    def _parts(self) -> list[tuple[int, int]]:
        """[low, high) of each part of the timestep range."""
        low, width = self.objective.low, self.objective.high - self.objective.low
        edges = [low + width * part // TIMESTEPS for part in range(TIMESTEPS + 1)]
        return list(zip(edges, edges[1:], strict=False))

    def measure(self, plan: ValidationPlan, held: Callable[[], AbstractContextManager[None]] = nullcontext) -> Losses:
        """Compute the losses now, of the version of the weights that the model holds within `held()`, without any
        effect on the training."""
        names = [draw_name(self.reader.records[held_out]) for held_out, _ in plan.pairs]
        held_out, trained = zip(*plan.pairs, strict=True)
        with (
            ProgressBar("validation", plan.passes, leave=False, delay=2) as bar,
            isolated_eval(self.modules),
            held(),
            self.autocast(),
        ):
            return Losses(self._losses(held_out, names, bar), self._losses(trained, names, bar))

    def _losses(self, numbers: Sequence[int], names: Sequence[str], bar: ProgressBar) -> Tensor:
        """(records, K) losses of records, with the timesteps and noise of `names`."""
        reader = self.reader
        places = [(reader.records[number].dataset, reader.placements[number].bucket) for number in numbers]
        sizes = [dataset.batch_size if self.padded else 1 for dataset in reader.datasets]
        losses = torch.zeros(len(numbers), TIMESTEPS, dtype=torch.float64)
        for batch in group_into_batches(range(len(numbers)), places, sizes):
            losses[batch] = self._batch([numbers[place] for place in batch], [names[place] for place in batch])
            bar.update(TIMESTEPS * len(batch))
        return losses

    def _batch(self, numbers: Sequence[int], names: Sequence[str]) -> Tensor:
        """Like _losses, for records of one bucket."""
        records = [self.reader.records[number] for number in numbers]
        latents = self.scaled(torch.stack([self.latents(number) for number in numbers]).to(self.device))
        texts = [validation_caption(record, self.reader.subsets[record.subset].captions) for record in records]
        conditioning = self.conditioning(texts, *self.sizes_and_scores(numbers))
        plain = Objective[Conditioning](
            self.objective.process, self.objective.prediction, self.objective.low, self.objective.high
        )
        losses = [
            plain.loss(self.predict, latents, conditioning, self._draws(names, part, latents.shape[1:]))
            for part in range(TIMESTEPS)
        ]
        return torch.stack(losses, 1).to("cpu", torch.float64)

    def _draws(self, names: Sequence[str], part: int, shape: torch.Size) -> Draws:
        low, width = self.objective.low, self.objective.high - self.objective.low
        at = [(part + python_random("validation timestep", name, part).random()) / TIMESTEPS for name in names]
        noise = [torch.randn(shape, generator=torch_generator("validation noise", name, part)) for name in names]
        return Draws(torch.tensor([low + int(u * width) for u in at]), torch.stack(noise))


def build_validation(  # noqa: PLR0913 - what a validation is made of, each from another room
    plan: ValidationPlan | None,
    duration: Duration,
    loss: TrainingLoss,
    dataset: TrainingDataset,
    encoder: LatentEncoder,
    modules: Sequence[nn.Module],
    run: Run,
    weights: Weights,
) -> Validation:
    """The validation of a run. `loss`, `dataset` and `weights` are the training's. Raises UserError for an image that
    cannot be read."""
    family = loss.model.family
    return Validation(
        plan=plan,
        reader=dataset.images,
        objective=loss.objective,
        predict=partial(family.predict, loss.model.backbone),
        conditioning=loss.conditioning.from_texts,
        sizes_and_scores=dataset.sizes_and_scores,
        padded=dataset.tokenize.padded,
        latents=validation_latents(plan, dataset, encoder),
        scaled=family.latent.scaled,
        device=loss.device,
        modules=modules,
        steps=duration.steps,
        steps_per_epoch=duration.steps_per_epoch,
        log=run.log,
        say=run.say,
        autocast=run.accelerator.autocast,
        versions=weights.shown(),
    )


def validation_latents(
    plan: ValidationPlan | None, dataset: TrainingDataset, encoder: LatentEncoder
) -> Callable[[int], Tensor]:
    """A function from a record's index to its latents: from the cache, or encoded now and kept in memory (64 KiB per
    image of 512x512)."""
    store = dataset.latents
    if store is not None:
        return lambda number: read_one(lambda: store.get(number, False).latents)
    numbers = [] if plan is None else plan.numbers
    encoded = encoder.encode_some(dataset.images, numbers) if numbers else []
    return dict(zip(numbers, encoded, strict=True)).__getitem__
