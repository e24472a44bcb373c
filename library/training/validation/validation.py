"""The loss on images that are not trained on, taken so that two of its values can be compared.

An image i is asked at K timesteps, one from each of K equal parts of the range that is trained:

    t_ib = floor(low + (b + u_ib) / K (high - low)),   b = 0 .. K-1,   u_ib uniform in [0, 1)

with noise n_ib. Both are drawn from the image's name and b alone: they are the same at every validation, in every
run, whatever the seed, the batch size or the other images. So what moves from one value to the next is the model.
The loss is the plain squared error of what the network predicts, whatever the training's own loss is: no weights, no
masks, noise without offset, the whole caption, nothing cropped or mirrored by chance; latents are the posterior sample
that a cache would hold.

Every such image has a partner that is trained on, which is asked with the same t_ib and n_ib. The mean difference of
the two is the divergence: about 0 at first, and it grows as images are memorised. (sd-scripts subtracts the moving
average of the training loss, which is of other timesteps, weights and noise, and has no meaning as a difference.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from library.data.cache.latent_cache import LatentStore
from library.data.dataset import TrainingDataset
from library.data.reading import ImageReader
from library.families.family import Conditioning
from library.objective.objective import Draws, Objective, Predict
from library.runtime.seeds import python_random, torch_generator
from library.training.inputs import encode_latents
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
    from library.families.family import Model
    from library.training.plan.facts import RunFacts
    from library.training.run import Run
    from library.training.saving.state import Progress
    from library.training.weight_averaging import Weights


@dataclass(frozen=True)
class Losses:
    """The loss of each pair at each of its timesteps, (pairs, K) float64 on the CPU: of the image that is set aside,
    and of the one that is trained on."""

    held_out: Tensor
    trained: Tensor

    @property
    def average(self) -> float:
        """Of the images that are set aside."""
        return float(self.held_out.mean())

    @property
    def divergence(self) -> float:
        """By how much they are worse than those that are trained on."""
        return float((self.held_out - self.trained).mean())

    @property
    def error(self) -> float | None:
        """Standard error of the divergence, from how much the pairs differ; None for one pair."""
        by_pair = (self.held_out - self.trained).mean(1)
        return float(by_pair.std()) / math.sqrt(len(by_pair)) if len(by_pair) > 1 else None

    def __str__(self) -> str:
        count, trained = len(self.held_out), float(self.trained.mean())
        spread = "" if self.error is None else f" ± {self.error:.2g}"
        images = "1 image" if count == 1 else f"{count} images"
        return (
            f"validation loss {self.average:.4f} on {images}, {trained:.4f} on as many that are trained on: "
            f"divergence {self.divergence:+.4f}{spread}"
        )


@dataclass
class Validation:
    """What the loop calls. `plan` None: nothing is set aside, and nothing is ever done.

    `predict` and `objective` are those of the training, of which only process, prediction and range count here;
    `conditioning(texts, sizes, scores)` is that of captions, which are all of one length if `padded`;
    `sizes_and_scores(numbers)` are those of records of the reader; `latents(number)` those of a
    record of the reader, (C, h, w) float32, not scaled; `scaled` scales them as the backbone sees them. `modules` are
    all that take part, with the adapters that a run trains; `weights` shows the weights that a saved file would hold.
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
    weights: Callable[[], AbstractContextManager[None]] = nullcontext
    _last: tuple[int, Losses] | None = field(default=None, init=False)

    def due(self, progress: Progress, *, epoch_ended: bool) -> None:
        """Validate if it is due: called after every optimiser step and after every whole epoch. An epoch that is cut
        short by the end of the run counts too."""
        if not epoch_ended:
            self.after_step(progress.step)
        if epoch_ended or (progress.step >= self.steps and progress.window < self.steps_per_epoch):
            self.after_epoch(progress.epoch, progress.step)

    def after_step(self, step: int) -> None:
        """Validate if it is due after `step` optimiser steps."""
        if self.plan is not None and self.plan.every_n_steps and step % self.plan.every_n_steps == 0:
            self._validate(self.plan, "step", step, step)

    def after_epoch(self, epoch: int, step: int) -> None:
        """Validate if it is due at the end of `epoch`, counted from 1, which came with `step`."""
        if self.plan is not None and self.plan.every_n_epochs and epoch % self.plan.every_n_epochs == 0:
            self._validate(self.plan, "epoch", epoch, step)

    def _validate(self, plan: ValidationPlan, kind: str, at: int, step: int) -> None:
        """Log the losses under the names of `kind` (step, epoch); both may be due after one step."""
        if self._last is None or self._last[0] != step:
            self._last = step, self.measure(plan)
            self.say(f"step {step}: {self._last[1]}")
        self.log(dict(self._logged(kind, self._last[1])), at)

    def _logged(self, kind: str, losses: Losses) -> Mapping[str, float]:
        """Names and values. The first two are those of sd-scripts; the others are the parts of the average."""
        parts = zip(self._parts(), losses.held_out.mean(0).tolist(), strict=True)
        return {
            f"loss/validation/{kind}_average": losses.average,
            f"loss/validation/{kind}_divergence": losses.divergence,
            **{f"loss/validation/{kind}_average_t{low:03d}_{high - 1:03d}": value for (low, high), value in parts},
        }

    def _parts(self) -> list[tuple[int, int]]:
        """Where the parts of the range of timesteps begin and end."""
        low, width = self.objective.low, self.objective.high - self.objective.low
        edges = [low + width * part // TIMESTEPS for part in range(TIMESTEPS + 1)]
        return list(zip(edges, edges[1:], strict=False))

    def measure(self, plan: ValidationPlan) -> Losses:
        """Take the losses now. Nothing of the training notices."""
        names = [draw_name(self.reader.records[held_out]) for held_out, _ in plan.pairs]
        held_out, trained = zip(*plan.pairs, strict=True)
        with (
            tqdm(desc="validation", total=plan.passes, leave=False, delay=2) as bar,
            isolated_eval(self.modules),
            self.weights(),
            self.autocast(),
        ):
            return Losses(self._losses(held_out, names, bar), self._losses(trained, names, bar))

    def _losses(self, numbers: Sequence[int], names: Sequence[str], bar: tqdm) -> Tensor:
        """(records, K): of records, with the timesteps and the noise of `names`."""
        reader = self.reader
        places = [(reader.records[number].dataset, reader.placements[number].bucket) for number in numbers]
        sizes = [dataset.batch_size if self.padded else 1 for dataset in reader.datasets]
        found = torch.zeros(len(numbers), TIMESTEPS, dtype=torch.float64)
        for batch in group_into_batches(range(len(numbers)), places, sizes):
            found[batch] = self._batch([numbers[place] for place in batch], [names[place] for place in batch])
            bar.update(TIMESTEPS * len(batch))
        return found

    def _batch(self, numbers: Sequence[int], names: Sequence[str]) -> Tensor:
        """As _losses, for records of one bucket."""
        records = [self.reader.records[number] for number in numbers]
        latents = self.scaled(torch.stack([self.latents(number) for number in numbers]).to(self.device))
        texts = [validation_caption(each, self.reader.subsets[each.subset].captions) for each in records]
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


def build_validation(
    facts: RunFacts,
    loss: TrainingLoss,
    modules: Sequence[nn.Module],
    dataset: TrainingDataset,
    run: Run,
    weights: Weights,
) -> Validation:
    """The validation of a run; `loss`, `dataset` and `weights` are those of the training.

    Raises UserError for an image that cannot be read.
    """
    model, conditioner, reader = loss.model, loss.conditioning, dataset.images
    return Validation(
        plan=facts.validation,
        reader=reader,
        objective=loss.objective,
        predict=partial(model.family.predict, model.backbone),
        conditioning=conditioner.from_texts,
        sizes_and_scores=dataset.sizes_and_scores,
        padded=dataset.tokenize.padded,
        latents=validation_latents(facts, model, loss.vae, reader, dataset.latents),
        scaled=model.family.latent.scaled,
        device=loss.device,
        modules=modules,
        steps=facts.duration.steps,
        steps_per_epoch=facts.duration.steps_per_epoch,
        log=run.log,
        say=run.say,
        autocast=run.accelerator.autocast,
        weights=weights.averaged,
    )


def validation_latents(
    facts: RunFacts, model: Model, vae: Any, reader: ImageReader, store: LatentStore | None
) -> Callable[[int], Tensor]:
    """The latents of the records that take part: those of the cache, or else the same ones, encoded now and kept in
    memory (64 KiB an image of 512x512). `vae` is the one that computes."""
    if store is not None:
        return lambda number: store.get(number, False).latents
    numbers = [] if facts.validation is None else facts.validation.numbers
    alone = replace(
        reader,
        records=[replace(reader.records[number], held_out=True) for number in numbers],  # without mirror images
        placements=[reader.placements[number] for number in numbers],
    )
    kept = encode_latents(facts, model, vae, alone).store if numbers else None
    places = {number: place for place, number in enumerate(numbers)}

    def encoded(number: int) -> Tensor:
        if kept is None:
            raise ValueError("no image is set aside")
        return kept.get(places[number], False).latents

    return encoded
