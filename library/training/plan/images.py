"""The images of a run: datasets, captions, buckets and the order of the epochs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from library.data import buckets, captions
from library.data.image_files import ImageSource
from library.data.order import NO_SHARD, EpochOrder, Locality
from library.data.scan.caption_lengths import count_all
from library.data.scan.dataset_specs import cache_folder, describe
from library.data.scan.image_record import ImageRecord
from library.data.scan.scan import Scan, scan
from library.data.scan.shard_images import describe_reading, joined, shard_numbers, to_disk
from library.families.family import Tokenizer
from library.options.datasets import CaptionSettings, DatasetSpec, SubsetSpec
from library.options.mistakes import Mistakes
from library.options.train_options import TrainOptions
from library.runtime.garbage import gc_paused
from library.training.plan.masks import check_masks


@dataclass(frozen=True)
class SubsetCount:
    """Counts of one subset. `images` includes the `held_out` ones, which are in no sample. `own_captions`: images with
    a caption of their own. `samples`: images x repeats of an epoch, after balancing regularisation images."""

    subset: SubsetSpec
    images: int
    own_captions: int
    samples: int
    held_out: int = 0


@dataclass(frozen=True)
class Captions:
    """Token counts of the captions, without begin and end tokens. `cut`: the images whose captions exceed `limit`."""

    limit: int
    longest: int
    longest_text: str
    cut: tuple[ImageSource, ...]


@dataclass(frozen=True)
class Images:
    """The scanned data with its buckets: `table` for the training images, `held_out` for the held-out images."""

    scan: Scan
    table: buckets.BucketTable
    held_out: buckets.BucketTable
    subsets: tuple[SubsetCount, ...]
    captions: Captions
    notes: tuple[str, ...]  # about the dataset file, the buckets and the masks

    @property
    def records(self) -> Sequence[ImageRecord]:
        """The training images."""
        return self.scan.records

    @property
    def all_records(self) -> Sequence[ImageRecord]:
        """The training images, then the held-out images: a training image has the same index in both properties."""
        return joined(self.scan.records, self.scan.held_out)

    @property
    def all_placements(self) -> tuple[buckets.Placement, ...]:
        """The placements of `all_records`."""
        return self.table.placements + self.held_out.placements

    @property
    def number_of_files(self) -> int:
        """The number of different training images: several datasets may contain one image."""
        return len({record.path for record in self.records})

    def order(self, accumulation: int, seed: int, shard_buffer: int = 0) -> EpochOrder:
        """The order of the batches of every epoch. `shard_buffer`: how many shards are read at a time, 0 for any."""
        locality = None
        if shard_buffer and self.scan.shards:
            locality = Locality(shard_numbers(self.records, NO_SHARD), shard_buffer)
        return EpochOrder(
            [record.dataset for record in self.records],
            [placement.bucket for placement in self.table.placements],
            [record.repeats for record in self.records],
            batch_sizes=[dataset.batch_size for dataset in self.scan.datasets],
            accumulation=accumulation,
            seed=seed,
            locality=locality,
        )


@gc_paused()
def decide_images(options: TrainOptions, tokenizer: Tokenizer | None, mistakes: Mistakes, seed: int) -> Images | None:
    """Read the dataset options, scan the images, assign buckets and count tokens.

    `tokenizer` None: the family is unknown, and no tokens are counted. `seed` of the run decides which images are held
    out. None, with mistakes added, if the rest of the plan cannot be made without these images.
    """
    data = options.dataset
    if not (data.train_data_dir or data.dataset_config or data.data_backend_config):
        return None  # reported by the rules of the options
    described = describe(options)
    mistakes.extend(described.mistakes)
    if options.cache.cache_latents:
        check_cached_variation(described.datasets, options, mistakes)
    if not described.datasets:
        return None
    caches = cache_folder(data)
    index = caches / "index"
    scanned = scan(
        described.datasets, index, progress=True, seed=seed, most_memory=data.max_image_memory, caches=caches
    )
    mistakes.extend(scanned.mistakes)
    if not scanned.records:
        return None
    table = buckets.build_bucket_table(scanned.records, scanned.datasets)
    held_out = buckets.build_bucket_table(scanned.held_out, scanned.datasets)
    if described.mistakes or scanned.mistakes:
        return None
    mask_notes = check_masks(options.mask, scanned, index, mistakes, data.max_image_memory)
    notes = (*described.notes, *table.notes, *held_out.notes, *unused_face_crops(described.datasets), *mask_notes)
    notes += tuple(describe_reading(scanned.shards, data.shard_buffer))
    lengths = Captions(0, 0, "", ()) if tokenizer is None else count_captions(scanned, tokenizer, index)
    counts = count_subsets(scanned)
    on_disk = replace(
        scanned,
        records=to_disk(scanned.records, scanned.shards),
        held_out=to_disk(scanned.held_out, scanned.shards),
    )
    return Images(on_disk, table, held_out, counts, lengths, notes)


def check_cached_variation(datasets: Sequence[DatasetSpec], options: TrainOptions, mistakes: Mistakes) -> None:
    """Refuse augmentations of a dataset file that cached latents cannot have. Flags are left to the rules of the
    options, so that no mistake is reported twice."""
    data = options.dataset
    crop = "random_crop" if data.data_backend_config is None else "crop_style random"
    flag = "cache_latents_to_disk" if options.cache.cache_latents_to_disk else "cache_latents"
    for dataset, subset in _subsets(datasets):
        if subset.validation:  # always cropped at the same place
            continue
        face_crop = subset.images.face_crop is not None and not dataset.buckets.enabled
        for key, is_on, by_flag, what in (
            (crop, subset.images.random_crop, data.random_crop, "crop"),
            ("color_aug", subset.images.colour, data.color_aug, "colours"),
            ("face_crop_aug_range", face_crop, data.face_crop_aug_range is not None, "crop"),
        ):
            if is_on and not by_flag:
                remedy = 'set "crop_style": "center"' if key == "crop_style random" else f"remove {key} there"
                mistakes.add(
                    f"{key} ({subset.origin}) cannot be combined with --{flag}: a cached image is encoded once, so its "
                    f"{what} cannot vary",
                    f"{remedy}, or remove --{flag}",
                )


def unused_face_crops(datasets: Sequence[DatasetSpec]) -> tuple[str, ...]:
    """A note for each subset whose crops around faces have no effect because of buckets."""
    return tuple(
        dict.fromkeys(
            f"face_crop_aug_range ({subset.origin}) has no effect with enable_bucket: face crops have a fixed size"
            for dataset, subset in _subsets(datasets)
            if subset.images.face_crop is not None and dataset.buckets.enabled
        )
    )


def _subsets(datasets: Sequence[DatasetSpec]) -> Iterator[tuple[DatasetSpec, SubsetSpec]]:
    for dataset in datasets:
        for subset in dataset.subsets:
            yield dataset, subset


def count_subsets(scanned: Scan) -> tuple[SubsetCount, ...]:
    """Count images, captions and samples of each subset."""
    records = joined(scanned.records, scanned.held_out)
    images = Counter(record.subset for record in records)
    own = Counter(record.subset for record in records if record.from_file)
    held_out = Counter(record.subset for record in scanned.held_out)
    samples: Counter[int] = Counter()
    for record in scanned.records:
        samples[record.subset] += record.repeats
    return tuple(
        SubsetCount(subset, images[index], own[index], samples[index], held_out[index])
        for index, subset in enumerate(scanned.subsets)
    )


def count_captions(scanned: Scan, tokenizer: Tokenizer, index: Path | None = None) -> Captions:
    """Count the tokens of the longest text that each caption can become; equal texts are counted once.

    `index`: folder in which the counts are kept.
    """
    plain = {number for number, subset in enumerate(scanned.subsets) if _keeps_captions(subset.captions)}
    longest_of: dict[tuple[int, str], list[str]] = {}
    records = joined(scanned.records, scanned.held_out)
    for record in records:
        key = (record.subset, record.caption)
        if record.subset in plain:
            longest_of[key] = [record.caption]
        elif key not in longest_of:
            longest_of[key] = captions.longest_texts(
                record.caption, scanned.subsets[record.subset].captions, tokenizer.count
            )
    texts = {text for candidates in longest_of.values() for text in candidates}
    counts = count_all(texts, tokenizer.counts, tokenizer.name, index)
    cut = [
        record.path
        for record in records
        if any(counts[text] > tokenizer.limit for text in longest_of[record.subset, record.caption])
    ]
    longest = max(counts, key=lambda text: (counts[text], text))
    return Captions(tokenizer.limit, counts[longest], longest, tuple(cut))


def _keeps_captions(settings: CaptionSettings) -> bool:
    """Whether captions are used unchanged, or dropped."""
    return replace(settings, dropout_rate=0.0, dropout_every_n_epochs=0) == CaptionSettings()
