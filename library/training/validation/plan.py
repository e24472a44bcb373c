"""Plan the validation loss: on which images, and when. No torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from library.data import captions
from library.data.order import Place
from library.data.scan.image_record import ImageRecord
from library.options.datasets import CaptionSettings
from library.options.groups.validation import ValidationOptions
from library.runtime.seeds import draw_seed, python_random
from library.training.plan.duration import PASSES_OF_A_SAMPLE, Duration
from library.training.plan.images import Images

TIMESTEPS = 8
"""Timesteps per image: one from each of as many equal parts of the trained range."""


MOST = 16
"""Images of a set that is trained on and not paired with held-out images, without max_validation_steps."""

SetName = Literal["held_out", "training", "class"]


@dataclass(frozen=True)
class ImageSet:
    """Images whose loss is a curve of its own. `numbers`: their indices among all records. `points`: for each of them
    the record whose content its timesteps and noise are drawn from."""

    name: SetName
    numbers: tuple[int, ...]
    points: tuple[int, ...]


@dataclass(frozen=True)
class ValidationPlan:
    """Each of `pairs` is a held-out image and a training image, by their indices among all records. Both get the same
    timesteps and noise, so the difference of their losses measures memorisation. Without pairs, `training` images are
    measured by themselves. `of_class`: images of the class, whose loss shows forgetting. `every_n_steps` and
    `every_n_epochs` None: not by steps, not by epochs."""

    pairs: tuple[tuple[int, int], ...]
    every_n_steps: int | None
    every_n_epochs: int | None
    training: tuple[int, ...] = ()
    of_class: tuple[int, ...] = ()

    @property
    def sets(self) -> list[ImageSet]:
        """The sets that have images."""
        held_out = tuple(number for number, _ in self.pairs)
        partners = tuple(number for _, number in self.pairs)
        sets = (
            ImageSet("held_out", held_out, held_out),
            ImageSet("training", partners or self.training, held_out or self.training),
            ImageSet("class", self.of_class, self.of_class),
        )
        return [each for each in sets if each.numbers]

    @property
    def numbers(self) -> list[int]:
        """The indices of all records that are validated on, each once, sorted."""
        return sorted({number for each in self.sets for number in each.numbers})

    @property
    def passes(self) -> int:
        """Forward passes per validation, counted in samples."""
        return TIMESTEPS * sum(len(each.numbers) for each in self.sets)

    def share_of_training(self, duration: Duration, samples_per_epoch: int, versions: int = 1) -> float:
        """Estimated validation time divided by training time. `versions`: how many versions of the weights are
        validated; the base model is once."""
        epochs = self.every_n_epochs or float("inf")
        if self.every_n_steps is not None:
            epochs = min(epochs, self.every_n_steps / duration.steps_per_epoch)
        in_all = duration.steps / duration.steps_per_epoch
        return self.passes * (versions / epochs + 1 / in_all) / (PASSES_OF_A_SAMPLE * samples_per_epoch)


def decide_validation(options: ValidationOptions, images: Images) -> ValidationPlan | None:
    """The plan. None without images that are only validated on, unless the user says when to validate. The default is
    once per epoch."""
    every_steps, every_epochs = options.validate_every_n_steps, options.validate_every_n_epochs
    is_asked_for = every_steps is not None or every_epochs is not None
    if not images.scan.held_out and not is_asked_for:
        return None
    groups: dict[tuple[bool, bool], list[int]] = {}
    for number, record in enumerate(images.all_records):
        groups.setdefault((record.held_out, record.is_reg), []).append(number)

    def choose(numbers: Collection[int], most: int | None) -> tuple[int, ...]:
        batches = group_into_batches(_in_fixed_order(numbers, images), _places(images), _batch_sizes(images))
        chosen = [number for batch in batches[: options.max_validation_steps] for number in batch]
        return tuple(chosen if options.max_validation_steps else chosen[:most])

    held_out, trained = choose(groups.get((True, False), ()), None), groups.get((False, False), [])
    of_class, reg = groups.get((True, True), []), groups.get((False, True), [])
    return ValidationPlan(
        pairs=tuple(zip(held_out, _partners(held_out, trained, images), strict=True)),
        every_n_steps=every_steps,
        every_n_epochs=every_epochs if is_asked_for else 1,
        training=() if held_out else choose(trained, MOST),
        of_class=choose(of_class, None) if of_class else choose(reg, MOST),
    )


def draw_name(record: ImageRecord) -> str:
    """What the choice of images and wildcards is drawn from: the file name without the folder, whose name contains the
    repeats."""
    return unicodedata.normalize("NFC", record.name)


def validation_captions(validation: ValidationPlan | None, images: Images) -> list[str]:
    """The captions of all records that are validated on."""
    records, subsets = images.all_records, images.scan.subsets
    numbers = [] if validation is None else validation.numbers
    return [validation_caption(records[number], subsets[records[number].subset].captions) for number in numbers]


def validation_caption(record: ImageRecord, chosen: CaptionSettings) -> str:
    """The full caption, without shuffling, dropout or warm-up. Wildcards are drawn by file name, always the same."""
    fixed = replace(
        chosen, shuffle=False, dropout_rate=0.0, dropout_every_n_epochs=0, tag_dropout_rate=0.0, warmup_step=0.0
    )
    return captions.process(record.caption, fixed, python_random("validation caption", draw_name(record)), epoch=1)


def group_into_batches(numbers: Iterable[int], places: Sequence[Place], sizes: Sequence[int]) -> list[list[int]]:
    """Group records by dataset and bucket into batches of at most the dataset's batch size (`sizes` by dataset),
    ordered by their first record."""
    batches: list[list[int]] = []
    open_batches: dict[Place, list[int]] = {}
    for number in numbers:
        place = places[number]
        batch = open_batches.setdefault(place, [])
        if not batch:
            batches.append(batch)
        batch.append(number)
        if len(batch) == sizes[place[0]]:
            del open_batches[place]
    return batches


def _places(images: Images) -> list[Place]:
    both = zip(images.all_records, images.all_placements, strict=True)
    return [(record.dataset, placement.bucket) for record, placement in both]


def _batch_sizes(images: Images) -> list[int]:
    return [dataset.batch_size for dataset in images.scan.datasets]


def _in_fixed_order(numbers: Iterable[int], images: Images) -> list[int]:
    """A random order that depends only on file names, not on the seed or on the other images."""
    records = images.all_records
    return sorted(numbers, key=lambda number: draw_seed("validation", draw_name(records[number])))


def _partners(held_out: Sequence[int], trained: Collection[int], images: Images) -> Iterator[int]:
    """A training image for each held-out one: from its folder and bucket, else from its folder, else any. None is used
    twice before all have been used."""
    records, places = images.all_records, _places(images)
    pools: dict[object, list[int]] = {}
    for number in reversed(_in_fixed_order(trained, images)):
        for kind in ((records[number].subset, places[number]), records[number].subset, None):
            pools.setdefault(kind, []).append(number)
    left = {kind: list(pool) for kind, pool in pools.items()}
    taken: set[int] = set()
    for number in held_out:
        if len(taken) == len(trained):
            left, taken = {kind: list(pool) for kind, pool in pools.items()}, set()
        for kind in ((records[number].subset, places[number]), records[number].subset, None):
            pool = left.get(kind, [])
            while pool and pool[-1] in taken:
                pool.pop()
            if pool:
                taken.add(pool[-1])
                yield pool.pop()
                break
