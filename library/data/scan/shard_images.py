"""Images in shards as a subset: from the rows of the table to records, without reading a shard.

After the plan, the records of shards are not kept: each is made again of its row in the table when it is asked for. A
run then needs 16 bytes of memory for an image, in every process, and the table is on the disk.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import overload

from library.data.scan.caption_files import lines_of
from library.data.scan.image_record import ImageRecord
from library.data.scan.listing import is_image
from library.data.shards.member import TABLE_NAME, Member, Shard
from library.data.shards.opening import OpenedShards, open_shards
from library.data.shards.places import Places, locate
from library.data.shards.table import Row, ShardTable
from library.messages import counted, listed
from library.options.convert_values import is_remote
from library.options.datasets import SubsetSpec
from library.options.groups.caption import NO_FILES
from library.options.mistakes import Mistake, UserError

_RECENT = 256  # records that are kept


def places_of(subset: SubsetSpec) -> Places | None:
    """Where the shards of a subset are: those that it names, or those in its folder; None for a folder of images.
    Raises UserError for a pattern that cannot be read."""
    if subset.shards is not None:
        return locate(subset.shards, None if subset.shard_table is None else str(subset.shard_table))
    folder = None if subset.metadata_file is not None else subset.image_folder
    if folder is None or not (folder / TABLE_NAME).is_file():
        return None
    return locate(str(folder))


@dataclass(frozen=True)
class ShardImages:
    """The images of a subset in shards. `number` of the subset, `place` of its dataset."""

    subset: SubsetSpec
    number: int
    place: int
    folder: Path
    table: ShardTable
    shards: Mapping[int, Shard]
    has_masks: bool  # whether there are masks in the shards
    masks_wanted: bool  # whether the user asked for masks

    @property
    def masks(self) -> bool:
        """Whether the masks in the shards are used."""
        return self.has_masks and self.masks_wanted

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Rows of the shards that are used, in the order of their names, with their numbers."""
        for number, row in self.table.rows():
            if row.shard in self.shards:
                yield number, row

    def record(self, number: int, row: Row) -> ImageRecord:
        """The record of a row."""
        subset = self.subset
        caption, from_file = self.caption(row)
        score = subset.score if row.score is None else row.score
        shard = self.shards[row.shard]
        return ImageRecord(
            self.folder, row.name, self.number, self.place, (row.width, row.height),
            caption, from_file, subset.repeats, subset.is_reg, row.transparent,
            mask=row.mask if self.masks else None, score=score,
            profile=row.profile, animated=row.animated, length=row.length,  # type: ignore[arg-type]
            member=Member(shard, row.name, row.offset, row.length, row.content, row.alpha),
            mask_member=self._mask(row), row=number,
        )  # fmt: skip

    def caption(self, row: Row) -> tuple[str, bool]:
        """The caption of a row, and whether it is the image's own."""
        own = self.subset.caption_source in ("files", "metadata") and NO_FILES not in self.subset.caption_extensions
        if own and row.caption is not None:
            return lines_of(row.caption, all_lines=self.subset.captions.wildcard)[0], True
        return default_caption(self.subset, row.name), False

    def _mask(self, row: Row) -> Member | None:
        shard = None if row.mask_shard is None else self.shards.get(row.mask_shard)
        if not self.masks or row.mask is None or shard is None:
            return None
        place = row.mask_offset or 0, row.mask_length or 0
        return Member(shard, row.mask, *place, row.mask_content or b"", row.mask_values)


def open_images(subset: SubsetSpec, number: int, place: int, places: Places, caches: Path | None) -> ShardImages:
    """The images of a subset in shards, whose record then names the shards and says whether their masks are used.
    `caches` None: beside the shards. Raises UserError for a table or shards that cannot be used."""
    beside = Path(places.table).parent / "caches"
    opened: OpenedShards = open_shards(places, caches or beside, subset.shard_copies)
    wanted, has_masks = subset.mask_dir is not None, opened.table.has_masks()
    shards = subset.shards or str(subset.image_dir)
    subset = replace(subset, shards=shards, shard_masks=wanted and has_masks, mask_dir=None)
    return ShardImages(subset, number, place, opened.folder, opened.table, opened.shards, has_masks, wanted)


def open_all(
    subsets: Sequence[tuple[int, SubsetSpec]], without: Collection[int], caches: Path | None
) -> tuple[dict[int, ShardImages], set[int], list[Mistake]]:
    """The subsets in shards by their number, of (dataset, subset). Then the numbers of all subsets without a folder of
    images: these, those whose shards cannot be used, and `without`; and what is wrong with the shards."""
    found: dict[int, ShardImages] = {}
    without_folder = set(without)
    mistakes: list[Mistake] = []
    for number, (place, subset) in enumerate(subsets):
        if number in without:
            continue
        try:
            places = places_of(subset)
            if places is not None:
                without_folder.add(number)
                found[number] = open_images(subset, number, place, places, caches)
        except UserError as error:
            without_folder.add(number)
            mistakes += [Mistake(f"{each.what} ({subset.origin})", each.remedy) for each in error.mistakes]
    return found, without_folder, mistakes


def default_caption(subset: SubsetSpec, name: str) -> str:
    """The caption of an image without one of its own. `name`: its file name."""
    if subset.caption_source == "file_name":
        return " ".join(name.rpartition("/")[2].rpartition(".")[0].replace("_", " ").split())
    return subset.class_tokens or ""


@dataclass(frozen=True)
class _Run:
    """Records that follow each other: of shards by their rows, with the repeats of each, or any others."""

    images: ShardImages | None
    rows: array[int]
    repeats: array[int]
    held_out: bool = False
    others: tuple[ImageRecord, ...] = ()

    def __len__(self) -> int:
        return len(self.others) if self.images is None else len(self.rows)

    def get(self, place: int) -> ImageRecord:
        if self.images is None:
            return self.others[place]
        number = self.rows[place]
        return self._record(self.images, number, self.images.table.row(number), self.repeats[place])

    def __iter__(self) -> Iterator[ImageRecord]:
        if self.images is None:
            yield from self.others
            return
        for (number, row), repeats in zip(self.images.table.rows(self.rows), self.repeats, strict=True):
            yield self._record(self.images, number, row, repeats)

    def _record(self, images: ShardImages, number: int, row: Row, repeats: int) -> ImageRecord:
        record = images.record(number, row)
        if (record.repeats, record.held_out) == (repeats, self.held_out):
            return record
        return replace(record, repeats=repeats, held_out=self.held_out)


class RecordsOnDisk(Sequence[ImageRecord]):
    """Records of which those in shards are made when they are asked for. Picklable."""

    def __init__(self, runs: Sequence[_Run]) -> None:
        self._runs = tuple(runs)
        self._ends = tuple(accumulate(map(len, self._runs)))
        self._recent: dict[int, ImageRecord] = {}  # a sample asks for its record several times

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[ImageRecord]:
        for run in self._runs:
            yield from run

    @overload
    def __getitem__(self, place: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[ImageRecord]: ...
    def __getitem__(self, place: int | slice) -> ImageRecord | Sequence[ImageRecord]:
        if isinstance(place, slice):
            return tuple(self[each] for each in range(*place.indices(len(self))))
        if place < 0:
            place += len(self)
        if not 0 <= place < len(self):
            raise IndexError(place)
        record = self._recent.get(place)
        if record is None:
            number = bisect_right(self._ends, place)
            record = self._runs[number].get(place - (self._ends[number] - len(self._runs[number])))
            if len(self._recent) >= _RECENT:
                self._recent.clear()
            self._recent[place] = record
        return record

    def followed_by(self, more: RecordsOnDisk) -> RecordsOnDisk:
        """These records, then others."""
        return RecordsOnDisk((*self._runs, *more._runs))


def to_disk(records: Sequence[ImageRecord], sources: Mapping[int, ShardImages]) -> Sequence[ImageRecord]:
    """The same records without those of shards in memory. `sources` by the number of the subset."""
    if not sources:
        return records
    runs = []
    for (number, held_out), group in groupby(records, key=lambda record: (record.subset, record.held_out)):
        some = tuple(group)
        images = sources.get(number)
        if images is None:
            runs.append(_Run(None, array("Q"), array("Q"), others=some))
        else:
            rows, repeats = (array("Q", [getattr(record, name) for record in some]) for name in ("row", "repeats"))
            runs.append(_Run(images, rows, repeats, held_out))
    return RecordsOnDisk(runs)


def joined(first: Sequence[ImageRecord], second: Sequence[ImageRecord]) -> Sequence[ImageRecord]:
    """Records of `to_disk`, one after the other."""
    if isinstance(first, RecordsOnDisk) and isinstance(second, RecordsOnDisk):
        return first.followed_by(second)
    return (*first, *second)


def shard_numbers(records: Sequence[ImageRecord], none: int) -> Sequence[int]:
    """A number for the shard of each record, the same for the same shard; `none` for a file."""
    numbers: dict[str, int] = {}
    return array(
        "q",
        (
            none if record.member is None else numbers.setdefault(record.member.shard.place, len(numbers))
            for record in records
        ),
    )


def describe_reading(found: Mapping[int, ShardImages], buffer: int) -> list[str]:
    """Notes about how shards are read. `buffer`: how many at a time, 0 for any."""
    if buffer and not found:
        return [f"--shard_buffer {buffer} has no effect: no images are in shards"]
    remote = [images.subset.source for images in found.values() if is_remote(images.subset.source)]
    if remote and not buffer:
        what = f"{listed(dict.fromkeys(remote))}: an image is read by a request of its own"
        return [f"{what}; --shard_buffer 8 copies whole shards instead, at most 16 at a time"]
    return []


def describe_loose(images: ShardImages, extensions: Collection[str]) -> list[str]:
    """A note about images that are files beside the shards of a folder, and are not read."""
    folder = images.subset.image_dir
    if not isinstance(folder, Path):
        return []
    loose = sum(is_image(name, extensions) for name in os.listdir(folder))
    return [f"{folder}: {counted(loose, 'image')} beside the shards not used"] if loose else []


def describe_masks(images: ShardImages) -> tuple[list[str], list[Mistake]]:
    """Notes and mistakes about the masks of images in shards, which are in the shards too."""
    subset = images.subset
    if not images.masks_wanted:
        if not images.has_masks:
            return [], []
        flags = f"--masked_loss, and {subset.source} as the folder of the masks"
        return [f"{subset.source}: the masks in the shards are not used; to use them set {flags}"], []
    if images.masks:
        return [], []
    what = f"{subset.source}: the shards contain no masks"
    if subset.origin.startswith("--"):  # a mask folder for all folders, some of which may have no masks
        return [f"{what}: trained unmasked"], []
    return [], [Mistake(what, "pack the masks with the images: tools/make_shards.py --conditioning_data_dir")]
