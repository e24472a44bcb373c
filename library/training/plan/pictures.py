"""What the pictures come to: folders, captions, buckets, and the order of the epochs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from library.data import buckets
from library.data.order import EpochOrder
from library.data.scan import ImageRecord, Scan, scan
from library.options.mistakes import Mistakes
from library.options.recipes import TrainOptions


@dataclass(frozen=True)
class SubsetCount:
    """One folder in numbers. `samples`: pictures x repeats of an epoch, after the balancing of regularisation
    pictures."""

    folder: Path
    class_tokens: str
    is_reg: bool
    repeats: int
    images: int
    caption_files: int
    samples: int


@dataclass(frozen=True)
class Captions:
    """Token counts of the captions, without begin and end; `cut` are the pictures whose captions are longer than
    `limit`."""

    limit: int
    longest: int
    longest_text: str
    cut: tuple[Path, ...]


@dataclass(frozen=True)
class Pictures:
    """The scanned data with its buckets; `table` places record by record."""

    scan: Scan
    table: buckets.BucketTable
    subsets: tuple[SubsetCount, ...]
    captions: Captions

    @property
    def records(self) -> tuple[ImageRecord, ...]:
        """The pictures of the run."""
        return self.scan.records

    @property
    def bucket_samples(self) -> Mapping[tuple[int, int], int]:
        """Samples of an epoch in each bucket (W, H)."""
        return self.table.samples

    def order(self, batch_size: int, accumulation: int, seed: int) -> EpochOrder:
        """The order of every epoch of the run."""
        return EpochOrder(
            [placement.bucket for placement in self.table.placements],
            [record.repeats for record in self.records],
            batch_size=batch_size,
            accumulation=accumulation,
            seed=seed,
        )


def decide_pictures(
    options: TrainOptions, count_tokens: Callable[[str], int] | None, mistakes: Mistakes
) -> Pictures | None:
    """Scan, place and count. `count_tokens` is the family's (None: no family, nothing is counted). None when something
    is so wrong that the rest has no meaning; the mistakes say what."""
    dataset = options.dataset
    if dataset.train_data_dir is None:
        return None  # the options' own rules say that it is required
    found = scan(dataset)
    mistakes.extend(found.mistakes)
    if not found.records:
        return None
    table = buckets.make_table(found.records, buckets.settings(dataset))
    mistakes.extend(table.mistakes)
    if found.mistakes or table.mistakes:
        return None
    limit = options.model.max_token_length or 75
    captions = count_captions(found, count_tokens or (lambda caption: 0), limit)
    return Pictures(found, table, count_subsets(found), captions)


def count_subsets(found: Scan) -> tuple[SubsetCount, ...]:
    """The folders of a scan in numbers."""
    counts = []
    for index, subset in enumerate(found.subsets):
        records = [record for record in found.records if record.subset == index]
        counts.append(
            SubsetCount(
                folder=subset.folder,
                class_tokens=subset.class_tokens,
                is_reg=subset.is_reg,
                repeats=subset.repeats,
                images=len(records),
                caption_files=sum(record.from_file for record in records),
                samples=sum(record.repeats for record in records),
            )
        )
    return tuple(counts)


def count_captions(found: Scan, count_tokens: Callable[[str], int], limit: int) -> Captions:
    """Count the tokens of every caption, equal ones once."""
    counts = {caption: count_tokens(caption) for caption in {record.caption for record in found.records}}
    text = max(counts, key=lambda caption: (counts[caption], caption))
    cut = tuple(record.path for record in found.records if counts[record.caption] > limit)
    return Captions(limit, counts[text], text, cut)
