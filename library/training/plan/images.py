"""What the images come to: datasets, captions, buckets, and the order of the epochs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from library.data import buckets, captions
from library.data.order import EpochOrder
from library.data.scan.caption_lengths import count_all
from library.data.scan.dataset_specs import cache_folder, describe
from library.data.scan.scan import ImageRecord, Scan, scan
from library.families.family import Tokenizer
from library.options.datasets import CaptionSettings, DatasetSpec, SubsetSpec
from library.options.mistakes import Mistakes
from library.options.train_options import TrainOptions
from library.runtime.garbage import gc_paused


@dataclass(frozen=True)
class SubsetCount:
    """One subset in numbers. `samples`: images x repeats of an epoch, after the balancing of regularisation
    images; `held_out` of the images are set aside for validation, and in no sample."""

    subset: SubsetSpec
    images: int
    own_captions: int
    samples: int
    held_out: int = 0


@dataclass(frozen=True)
class Captions:
    """Token counts of the captions, without begin and end; `cut` are the images whose captions are longer than
    `limit`."""

    limit: int
    longest: int
    longest_text: str
    cut: tuple[Path, ...]


@dataclass(frozen=True)
class Images:
    """The scanned data with its buckets; `table` places record by record, `held_out` those set aside for validation."""

    scan: Scan
    table: buckets.BucketTable
    held_out: buckets.BucketTable
    subsets: tuple[SubsetCount, ...]
    captions: Captions
    notes: tuple[str, ...]  # of the dataset's description

    @property
    def records(self) -> tuple[ImageRecord, ...]:
        """The images that are trained on."""
        return self.scan.records

    @property
    def all_records(self) -> tuple[ImageRecord, ...]:
        """Also those set aside, which come last: a number counts the same among both."""
        return self.scan.records + self.scan.held_out

    @property
    def all_placements(self) -> tuple[buckets.Placement, ...]:
        """Of all records."""
        return self.table.placements + self.held_out.placements

    def order(self, accumulation: int, seed: int) -> EpochOrder:
        """The order of every epoch of the run."""
        return EpochOrder(
            [record.dataset for record in self.records],
            [placement.bucket for placement in self.table.placements],
            [record.repeats for record in self.records],
            batch_sizes=[dataset.batch_size for dataset in self.scan.datasets],
            accumulation=accumulation,
            seed=seed,
        )


@gc_paused()
def decide_images(options: TrainOptions, tokenizer: Tokenizer | None, mistakes: Mistakes, seed: int) -> Images | None:
    """Describe, scan, place and count. `tokenizer` None: no family is known, no token is counted; `seed` is
    the run's, of which follows what is set aside for validation. None when something is so wrong that the rest has no
    meaning; the mistakes say what."""
    data = options.dataset
    if not (data.train_data_dir or data.dataset_config or data.data_backend_config):
        return None  # the options' own rules say that one of them is required
    described = describe(options)
    mistakes.extend(described.mistakes)
    if options.cache.cache_latents:
        refuse_variation(described.datasets, options, mistakes)
    if not described.datasets:
        return None
    index = cache_folder(data) / "index"
    found = scan(described.datasets, index=index, progress=True, seed=seed)
    mistakes.extend(found.mistakes)
    if not found.records:
        return None
    table = buckets.build_bucket_table(found.records, found.datasets)
    held_out = buckets.build_bucket_table(found.held_out, found.datasets)
    wrong = (*table.mistakes, *held_out.mistakes)
    mistakes.extend(wrong)
    if described.mistakes or found.mistakes or wrong:
        return None
    notes = (*described.notes, *idle_face_crops(described.datasets))
    counted = Captions(0, 0, "", ()) if tokenizer is None else count_captions(found, tokenizer, index)
    return Images(found, table, held_out, count_subsets(found), counted, notes)


def refuse_variation(datasets: Sequence[DatasetSpec], options: TrainOptions, mistakes: Mistakes) -> None:
    """What varies an image from sample to sample has no effect on its cached latents. Here for the subsets of a
    dataset file; flags are judged by the rules between them, and are not told twice."""
    data = options.dataset
    crop = "random_crop" if data.data_backend_config is None else "crop_style random"
    flag = "cache_latents_to_disk" if options.cache.cache_latents_to_disk else "cache_latents"
    for dataset, subset in _subsets(datasets):
        face_crop = subset.images.face_crop is not None and not dataset.buckets.enabled
        for key, varied, by_flag, what in (
            (crop, subset.images.random_crop, data.random_crop, "crop"),
            ("color_aug", subset.images.colour, data.color_aug, "colours"),
            ("face_crop_aug_range", face_crop, data.face_crop_aug_range is not None, "crop"),
        ):
            if varied and not by_flag:
                remedy = 'write "crop_style": "center"' if key == "crop_style random" else f"take {key} out there"
                mistakes.add(
                    f"{key} ({subset.origin}) excludes --{flag}: a cached image is encoded once, so its {what} cannot "
                    "vary",
                    f"{remedy}, or leave out --{flag}",
                )


def idle_face_crops(datasets: Sequence[DatasetSpec]) -> tuple[str, ...]:
    """A note for each subset that asks for crops around faces where buckets leave no room for them."""
    return tuple(
        dict.fromkeys(
            f"face_crop_aug_range ({subset.origin}) has no effect with enable_bucket: a crop around a face has one size"
            for dataset, subset in _subsets(datasets)
            if subset.images.face_crop is not None and dataset.buckets.enabled
        )
    )


def _subsets(datasets: Sequence[DatasetSpec]) -> Iterator[tuple[DatasetSpec, SubsetSpec]]:
    for dataset in datasets:
        for subset in dataset.subsets:
            yield dataset, subset


def count_subsets(found: Scan) -> tuple[SubsetCount, ...]:
    """The subsets of a scan in numbers."""
    both = found.records + found.held_out
    images = Counter(record.subset for record in both)
    own = Counter(record.subset for record in both if record.from_file)
    held_out = Counter(record.subset for record in found.held_out)
    samples: Counter[int] = Counter()
    for record in found.records:
        samples[record.subset] += record.repeats
    return tuple(
        SubsetCount(subset, images[index], own[index], samples[index], held_out[index])
        for index, subset in enumerate(found.subsets)
    )


def count_captions(found: Scan, tokenizer: Tokenizer, index: Path | None = None) -> Captions:
    """Count the tokens of the longest text that each caption can become, equal ones once."""
    plain = {index for index, subset in enumerate(found.subsets) if _leaves_captions(subset.captions)}
    longest_of: dict[tuple[int, str], list[str]] = {}
    records = found.records + found.held_out
    for record in records:
        key = (record.subset, record.caption)
        if record.subset in plain:
            longest_of[key] = [record.caption]
        elif key not in longest_of:
            longest_of[key] = captions.longest_texts(
                record.caption, found.subsets[record.subset].captions, tokenizer.count
            )
    texts = {text for several in longest_of.values() for text in several}
    counts = count_all(texts, tokenizer.counts, tokenizer.name, index)
    cut = [
        record.path
        for record in records
        if any(counts[text] > tokenizer.limit for text in longest_of[record.subset, record.caption])
    ]
    longest = max(counts, key=lambda text: (counts[text], text))
    return Captions(tokenizer.limit, counts[longest], longest, tuple(cut))


def _leaves_captions(chosen: CaptionSettings) -> bool:
    """Whether captions are trained as they stand in their files, or dropped."""
    return replace(chosen, dropout_rate=0.0, dropout_every_n_epochs=0) == CaptionSettings()
