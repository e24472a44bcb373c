"""The validation loss: the loss on images at fixed timesteps with fixed noise.

The loss of image i is computed at K timesteps, one from each of K equal parts of the trained range:

    t_ib = floor(low + (b + u_ib) / K (high - low)),   b = 0 .. K-1,   u_ib in [0, 1)

with noise n_ib. Both are drawn from the content of the image and b alone (points.py): they are the same at every
validation and in every run, whatever the seed, the batch size, the names or the other images. So only the model changes
the value. The loss is the mean squared error of the prediction, whatever the training loss is: without weights, masks
or noise offset, with the full caption, without random crops or mirroring. Latents are the posterior sample that a cache
would hold.

There are up to three sets of images (plan.py), each with a curve of its own. Every held-out image has a partner that is
trained on, with the same t_ib and n_ib. The mean difference of the two losses is the divergence: about 0 at first, it
grows as images are memorised. (sd-scripts subtracts the moving average of the training loss, which has other timesteps,
weights and noise, so the difference has no meaning.) The loss of class images grows as the class is forgotten.

Of images with a mask the loss within it is another curve: with the mask's weights m (masking.py),

    sum of m (output - target)^2 / (channels * sum of m)

The base model's losses at the same points are measured once, before the first step, and kept in training states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.data.cache.latent_cache import CachedLatents
from library.data.dataset import TrainingDataset
from library.data.reading import ImageReader
from library.data.retries import Unreadable, read_one
from library.families.family import Conditioning
from library.objective.masking import mask_weights
from library.objective.objective import Draws, Objective, Predict
from library.runtime.processes import ALONE, Processes
from library.runtime.progress import ProgressBar
from library.training.isolated_eval import isolated_eval
from library.training.plan.duration import Duration, ends_epoch
from library.training.training_loss import TrainingLoss
from library.training.validation.losses import (
    MASK,
    TAGS,
    Losses,
    Means,
    SetLosses,
    as_lists,
    describe,
    divergence_of,
    from_lists,
)
from library.training.validation.plan import (
    TIMESTEPS,
    ImageSet,
    ValidationPlan,
    group_into_batches,
    validation_caption,
)
from library.training.validation.points import content_keys, noise_of, timestep_of
from library.training.validation.table import Table

if TYPE_CHECKING:
    from library.training.averaging.weights import Versions, Weights
    from library.training.inputs import LatentEncoder
    from library.training.run import Run
    from library.training.saving.state import Progress
    from library.training.trainable import Trainable


BASE = "_base"
"""The suffix of the base model's values in logs."""

_VERSIONS = {"": "model", "_ema": "ema"}  # by suffix, in tables


@dataclass
class Validation:
    """Computes the validation loss of a run. `plan` None: it never does.

    `predict` and `objective` are the training's; of `objective` only process, prediction, timestep range and mask
    settings are used. `conditioning(texts, sizes, scores)` encodes captions, which all have one length if `padded`.
    `sizes_and_scores(numbers)` and `encoded(number)`, latents (C, h, w) float32 unscaled and mask (1, h, w) or
    None, are those of the reader's records; `scaled` scales latents for the backbone. `keys`: of each record, what
    its points are drawn from. `modules` are all modules of the forward pass, adapters included. `versions` of the
    weights are measured one after the other, and logged with their suffix. `base`: while it is open, the model is
    the base model; None: it cannot be had any more. `check_stop`: see Run.
    """

    plan: ValidationPlan | None
    reader: ImageReader
    objective: Objective[Conditioning]
    predict: Predict[Conditioning]
    conditioning: Callable[[list[str], Tensor, Tensor], Conditioning]
    sizes_and_scores: Callable[[Sequence[int]], tuple[Tensor, Tensor]]
    padded: bool
    encoded: Callable[[int], CachedLatents]
    keys: Mapping[int, str]
    scaled: Callable[[Tensor], Tensor]
    device: torch.device
    modules: Sequence[nn.Module]
    steps: int
    steps_per_epoch: int
    log: Callable[[dict[str, float], int], None]
    say: Callable[[str], None]
    warn: Callable[[str], None]
    table: Table
    check_stop: Callable[[], None] = lambda: None
    base: Callable[[], AbstractContextManager[None]] | None = None
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    versions: Versions = field(default_factory=lambda: {"": nullcontext})
    processes: Processes = Processes()
    _base: Means = field(default_factory=dict, init=False)
    _last: tuple[int, dict[str, Losses]] | None = field(default=None, init=False)

    def begin(self, progress: Progress) -> None:
        """Measure the base model, or take its values from the progress of a resumed run."""
        if self.plan is None:
            return
        kept = progress.base_losses
        try:
            with self.processes.failing_together():
                keys = dict(self._names_and_keys(self.plan))
            if not set(keys.values()) <= kept.keys():
                if self.base is None:
                    self.warn("no validation losses of the base model: the state has none of these images")
                    return
                losses = self.measure(self.plan, self.base)
                self.say(f"base model: {describe(losses, {})}")
                kept = {keys[name]: as_lists(means) for name, means in losses.means.items()}
        except Unreadable as error:
            self.warn(f"no validation losses of the base model: {error.mistakes[0].what}")
            return
        progress.base_losses = kept
        self._base = {name: from_lists(kept[key]) for name, key in keys.items()}
        self.table.add(0, 0, "base", self._parts(), self._base)
        self.table.write()

    def is_due(self, step: int) -> bool:
        """Whether it is due after this step by the number of steps."""
        every = self.plan.every_n_steps if self.plan is not None else None
        return every is not None and every > 0 and step % every == 0

    def due(self, progress: Progress, *, epoch_ended: bool) -> None:
        """Validate if due: see loop.DueCall. An incomplete last epoch counts as an epoch."""
        plan, step, epoch = self.plan, progress.step, progress.epoch
        if plan is None:
            return
        if not epoch_ended and self.is_due(step):
            self._validate(plan, "step", step, progress)
        ends = ends_epoch(step, progress.window, self.steps, self.steps_per_epoch, epoch_ended=epoch_ended)
        if ends and plan.every_n_epochs and epoch % plan.every_n_epochs == 0:
            self._validate(plan, "epoch", epoch, progress)

    def _validate(self, plan: ValidationPlan, kind: str, at: int, progress: Progress) -> None:
        """Log the losses under the names of `kind` (step, epoch). If both are due after one step, compute them once. If
        a file cannot be read, only this validation is lost."""
        step = progress.step
        if self._last is None or self._last[0] != step:
            try:
                self._last = step, {suffix: self.measure(plan, held) for suffix, held in self.versions.items()}
            except Unreadable as error:
                self.warn(f"step {step}: no validation loss: {error.mistakes[0].what}")
                return
            for suffix, losses in self._last[1].items():
                self.say(f"step {step}{' with the EMA' if suffix else ''}: {describe(losses, self._base)}")
                self.table.add(step, progress.epoch, _VERSIONS[suffix], self._parts(), losses.means)
            self.table.write()
            if self.table.memorises():
                self.warn(f"step {step}: {MEMORISES}")
        values = self._logged(kind, self._base, BASE)
        for suffix, losses in self._last[1].items():
            values |= self._logged(kind, losses.means, suffix)
        self.log(values, at)

    def _logged(self, kind: str, means: Means, suffix: str) -> dict[str, float]:
        """Log names and values: average and divergence have sd-scripts' names."""
        logged = {f"loss/validation/{kind}_{TAGS[name]}{suffix}": of_set[0].value for name, of_set in means.items()}
        divergence = divergence_of(means)
        if divergence is not None:
            logged[f"loss/validation/{kind}_divergence{suffix}"] = divergence
        for name, of_set in means.items():
            for (low, high), mean in zip(self._parts(), of_set[1:], strict=True):
                logged[f"loss/validation/{kind}_{TAGS[name]}_t{low:03d}_{high - 1:03d}{suffix}"] = mean.value
        return logged

    def _parts(self) -> list[tuple[int, int]]:
        """[low, high) of each part of the timestep range."""
        low, width = self.objective.low, self.objective.high - self.objective.low
        edges = [low + width * part // TIMESTEPS for part in range(TIMESTEPS + 1)]
        return list(zip(edges, edges[1:], strict=False))

    def measure(self, plan: ValidationPlan, held: Callable[[], AbstractContextManager[None]] = nullcontext) -> Losses:
        """Compute the losses now, of the version of the weights that the model holds within `held()`, without any
        effect on the training."""
        with (
            ProgressBar("validation", plan.passes, leave=False, delay=2) as bar,
            isolated_eval(self.modules),
            held(),
            self.autocast(),
        ):
            measured = {each.name: self._losses(each, bar) for each in plan.sets}
        sets = {name: whole for name, (whole, _) in measured.items()}
        none = torch.zeros(0, TIMESTEPS, dtype=torch.float64)
        different = next((len(set(each.numbers)) for each in plan.sets if each.name == "training"), None)
        return Losses(
            sets.get("held_out", none),
            sets.get("training", none),
            sets.get("class", none),
            different,
            {name: within for name, (_, within) in measured.items() if within.images},
        )

    def _losses(self, images: ImageSet, bar: ProgressBar) -> tuple[Tensor, SetLosses]:
        """(images, K) losses of a set, and those within masks of the images that have one. The processes share its
        batches."""
        reader, numbers, keys = self.reader, images.numbers, [self.keys[number] for number in images.points]
        places = [(reader.records[number].dataset, reader.placements[number].bucket) for number in numbers]
        sizes = [dataset.batch_size if self.padded else 1 for dataset in reader.datasets]
        losses, own = torch.zeros(2, len(numbers), TIMESTEPS, dtype=torch.float64), list[int]()
        with self.processes.failing_together():
            for batch in self.processes.own([*group_into_batches(range(len(numbers)), places, sizes)]):
                self.check_stop()
                encoded = [self.encoded(numbers[place]) for place in batch]
                masks = [self._weights(each) for each in encoded]
                latents = torch.stack([each.latents for each in encoded])
                records, points = [numbers[place] for place in batch], [keys[place] for place in batch]
                losses[:, batch] = self._batch(records, points, latents, masks)
                own += [place for place, mask in zip(batch, masks, strict=True) if mask is not None]
                bar.update(TIMESTEPS * len(batch) * self.processes.world)
        losses = self.processes.sum(losses)  # each has zeros where the others have losses
        masked = sorted(place for of_rank in self.processes.gather(own) for place in of_rank)
        return losses[0], SetLosses(losses[1][masked], len({numbers[place] for place in masked}))

    def _weights(self, encoded: CachedLatents) -> Tensor | None:
        """The weights of an image's mask, (1, h, w) in [0, 1]; None without one, and where nothing of it counts."""
        weights = None if encoded.mask is None else mask_weights(encoded.mask, self.objective.mask)
        return weights if weights is not None and weights.any() else None

    def _batch(
        self, numbers: Sequence[int], keys: Sequence[str], unscaled: Tensor, masks: Sequence[Tensor | None]
    ) -> Tensor:
        """(2, B, K) losses of records of one bucket, with the points of `keys`: of the image, and within its mask."""
        latents = self.scaled(unscaled.to(self.device))
        whole = torch.ones(1, *latents.shape[2:])
        within = torch.stack([whole if mask is None else mask for mask in masks]).to(self.device)
        texts = [self._caption(number) for number in numbers]
        conditioning = self.conditioning(texts, *self.sizes_and_scores(numbers))
        plain = Objective[Conditioning](
            self.objective.process, self.objective.prediction, self.objective.low, self.objective.high
        )
        losses = []
        for part in range(TIMESTEPS):
            draws = self._draws(keys, part, latents.shape[1:])
            output = self.predict(plain.noisy(latents, draws), draws.timesteps.to(self.device), conditioning)
            target = plain.target(latents, draws)
            inside = plain.distance(output, target, draws.timesteps, within) / within.flatten(1).mean(1)
            losses.append(torch.stack([plain.compare(output, target, draws.timesteps), inside]))
        return torch.stack(losses, 2).to("cpu", torch.float64)

    def _draws(self, keys: Sequence[str], part: int, shape: torch.Size) -> Draws:
        low, high = self.objective.low, self.objective.high
        timesteps = torch.tensor([timestep_of(key, part, low, high) for key in keys])
        return Draws(timesteps, torch.stack([noise_of(key, part, shape) for key in keys]))

    def _caption(self, number: int) -> str:
        record = self.reader.records[number]
        return validation_caption(record, self.reader.subsets[record.subset].captions)

    def _names_and_keys(self, plan: ValidationPlan) -> Iterator[tuple[str, str]]:
        """The names of the means that are measured, each with a key that changes with everything that they depend on
        besides the model."""
        for images in plan.sets:
            digest = hashlib.blake2b(digest_size=8)
            for number, point in zip(images.numbers, images.points, strict=True):
                bucket = self.reader.placements[number].bucket
                digest.update(f"{self.keys[number]} {self.keys[point]} {bucket} {self._caption(number)}\n".encode())
            yield images.name, f"{images.name} {digest.hexdigest()}"
            weights = (self._weights(self.encoded(number)) for number in images.numbers)
            masks = [mask for mask in weights if mask is not None]
            for mask in masks:
                digest.update(mask.numpy().tobytes())
            if masks:
                yield images.name + MASK, f"{images.name}{MASK} {digest.hexdigest()}"


MEMORISES = (
    "in the last three validations the loss of training images fell, and that of held-out images rose at middle "
    "timesteps: the model has begun to memorise its images. An earlier file may be the better one"
)


def build_validation(  # noqa: PLR0913 - what a validation is made of, each from another room
    plan: ValidationPlan | None,
    duration: Duration,
    loss: TrainingLoss,
    dataset: TrainingDataset,
    encoder: LatentEncoder,
    modules: Sequence[nn.Module],
    run: Run,
    weights: Weights,
    trainable: Trainable,
    table: Table,
    *,
    resumed: bool,
) -> Validation:
    """The validation of a run. `loss`, `dataset`, `trainable` and `weights` are the training's. Raises UserError for an
    image that cannot be read."""
    family = loss.model.family
    return Validation(
        plan=plan,
        reader=dataset.images,
        objective=loss.objective,
        predict=partial(family.predict, loss.model.backbone),
        conditioning=loss.conditioning.from_texts,
        sizes_and_scores=dataset.sizes_and_scores,
        padded=dataset.tokenize.padded,
        encoded=validation_images(plan, dataset, encoder, run.processes),
        keys=content_keys([] if plan is None else plan.numbers, dataset.images.records),
        scaled=family.latent.scaled,
        device=loss.device,
        modules=modules,
        steps=duration.steps,
        steps_per_epoch=duration.steps_per_epoch,
        log=run.log,
        say=run.say,
        warn=run.warn,
        table=table,
        check_stop=run.check_stop,
        base=trainable.switched_off or (None if resumed else nullcontext),
        autocast=run.accelerator.autocast,
        versions=weights.shown(),
        processes=run.processes,
    )


def validation_images(
    plan: ValidationPlan | None, dataset: TrainingDataset, encoder: LatentEncoder, processes: Processes = ALONE
) -> Callable[[int], CachedLatents]:
    """A function from a record's index to its latents and mask: from the cache, or encoded now and kept in memory
    (64 KiB per image of 512x512)."""
    store = dataset.latents
    if store is not None:
        return lambda number: read_one(lambda: store.get(number, False))
    own = processes.own([] if plan is None else [*plan.numbers])
    encoded: list[CachedLatents] = []
    with processes.failing_together():
        encoded = encoder.encode_some(dataset.images, own) if own else []
    return processes.merge(dict(zip(own, encoded, strict=True))).__getitem__
