"""Plan the validation loss: on which held-out images, and when. No torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from library.data import captions
from library.data.order import Place
from library.data.scan.scan import ImageRecord
from library.options.datasets import CaptionSettings
from library.options.groups.validation import ValidationOptions
from library.runtime.seeds import draw_seed, python_random
from library.training.plan.duration import PASSES_OF_A_SAMPLE, Duration
from library.training.plan.images import Images

TIMESTEPS = 8
"""Timesteps per image: one from each of as many equal parts of the trained range."""


@dataclass(frozen=True)
class ValidationPlan:
    """Each of `pairs` is a held-out image and a training image, by their indices among all records. Both get the same
    timesteps and noise, so the difference of their losses measures memorisation. `every_n_steps` and `every_n_epochs`
    None: not by steps, not by epochs."""

    pairs: tuple[tuple[int, int], ...]
    every_n_steps: int | None
    every_n_epochs: int | None

    @property
    def numbers(self) -> list[int]:
        """The indices of all records that are validated on, each once, sorted."""
        return sorted({number for pair in self.pairs for number in pair})

    @property
    def passes(self) -> int:
        """Forward passes per validation, counted in samples."""
        return 2 * TIMESTEPS * len(self.pairs)

    def share_of_training(self, duration: Duration, samples_per_epoch: int) -> float:
        """Estimated validation time divided by training time."""
        epochs = self.every_n_epochs or float("inf")
        if self.every_n_steps is not None:
            epochs = min(epochs, self.every_n_steps / duration.steps_per_epoch)
        return self.passes / (PASSES_OF_A_SAMPLE * samples_per_epoch * epochs)


def decide_validation(options: ValidationOptions, images: Images) -> ValidationPlan | None:
    """The plan, or None without held-out images. The default is once per epoch."""
    count = len(images.records)
    held_out = [number for number, record in enumerate(images.scan.held_out, count) if not record.is_reg]
    if not held_out:
        return None
    batches = group_into_batches(_in_fixed_order(held_out, images), _places(images), _batch_sizes(images))
    chosen = [number for batch in batches[: options.max_validation_steps] for number in batch]
    trained = [number for number, record in enumerate(images.records) if not record.is_reg]
    epochs = options.validate_every_n_epochs
    return ValidationPlan(
        pairs=tuple(zip(chosen, _partners(chosen, trained, images), strict=True)),
        every_n_steps=options.validate_every_n_steps,
        every_n_epochs=1 if epochs is None and options.validate_every_n_steps is None else epochs,
    )


def draw_name(record: ImageRecord) -> str:
    """The key of an image's random draws: its file name without the folder, whose name contains the repeats."""
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
