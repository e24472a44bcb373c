"""When the loss on images that are not trained on is taken, and on which of them. No torch."""

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
from library.training.plan.duration import Duration
from library.training.plan.images import Images

TIMESTEPS = 8
"""Timesteps that each image is asked at: one from each of as many equal parts of the range."""

_PASSES_OF_A_SAMPLE = 3  # of the network to train on a sample: there, and back at twice the cost


@dataclass(frozen=True)
class ValidationPlan:
    """Each of `pairs` is an image that is set aside and one that is trained on, by their numbers among all records:
    the second is asked the same as the first, so that the difference of the two losses tells what is memorised.
    `every_n_steps` and `every_n_epochs` None: not by steps, not by epochs."""

    pairs: tuple[tuple[int, int], ...]
    every_n_steps: int | None
    every_n_epochs: int | None

    @property
    def numbers(self) -> list[int]:
        """All records that take part, each once."""
        return sorted({number for pair in self.pairs for number in pair})

    @property
    def passes(self) -> int:
        """Samples that go through the network each time, without a way back."""
        return 2 * TIMESTEPS * len(self.pairs)

    def share_of_training(self, duration: Duration, samples_per_epoch: int) -> float:
        """About how much time is spent here for each second of training."""
        epochs = self.every_n_epochs or float("inf")
        if self.every_n_steps is not None:
            epochs = min(epochs, self.every_n_steps / duration.steps_per_epoch)
        return self.passes / (_PASSES_OF_A_SAMPLE * samples_per_epoch * epochs)


def decide_validation(options: ValidationOptions, images: Images) -> ValidationPlan | None:
    """The plan; None where nothing is set aside. Every epoch, if nothing else is said."""
    count = len(images.records)
    held_out = range(count, count + len(images.scan.held_out))
    if not held_out:
        return None
    batches = group_into_batches(_by_rank(held_out, images), _places(images), _batch_sizes(images))
    chosen = [number for batch in batches[: options.max_validation_steps] for number in batch]
    trained = [number for number, record in enumerate(images.records) if not record.is_reg]
    epochs = options.validate_every_n_epochs
    return ValidationPlan(
        pairs=tuple(zip(chosen, _partners(chosen, trained, images), strict=True)),
        every_n_steps=options.validate_every_n_steps,
        every_n_epochs=1 if epochs is None and options.validate_every_n_steps is None else epochs,
    )


def draw_name(record: ImageRecord) -> str:
    """What the draws for an image are keyed by: its name, but not that of its folder, which has the repeats in it."""
    return unicodedata.normalize("NFC", record.name)


def validation_captions(validation: ValidationPlan | None, images: Images) -> list[str]:
    """The captions that are validated with."""
    records, subsets = images.all_records, images.scan.subsets
    numbers = [] if validation is None else validation.numbers
    return [validation_caption(records[number], subsets[records[number].subset].captions) for number in numbers]


def validation_caption(record: ImageRecord, chosen: CaptionSettings) -> str:
    """The whole caption, with nothing left to chance but wildcards, which are drawn once and for all."""
    whole = replace(
        chosen, shuffle=False, dropout_rate=0.0, dropout_every_n_epochs=0, tag_dropout_rate=0.0, warmup_step=0.0
    )
    return captions.process(record.caption, whole, python_random("validation caption", draw_name(record)), epoch=1)


def group_into_batches(numbers: Iterable[int], places: Sequence[Place], sizes: Sequence[int]) -> list[list[int]]:
    """Records of one bucket of one dataset together, in batches of the dataset's size, in the order of their first."""
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


def _by_rank(numbers: Iterable[int], images: Images) -> list[int]:
    """In an order by chance that only names decide: with other images or another seed it stays."""
    records = images.all_records
    return sorted(numbers, key=lambda number: draw_seed("validation", draw_name(records[number])))


def _partners(held_out: Sequence[int], trained: Collection[int], images: Images) -> Iterator[int]:
    """A training image for each held-out one: of its folder and bucket, else of its folder, else any. Each is taken
    once, as long as there are enough."""
    records, places = images.all_records, _places(images)
    pools: dict[object, list[int]] = {}
    for number in reversed(_by_rank(trained, images)):
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
