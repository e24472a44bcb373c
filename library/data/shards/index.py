"""Make the table of shards that exist: WebDataset archives, by their members' names, without writing the shards.

In a WebDataset, the files of a sample follow each other and share their name up to the first point, the key:
0001.jpg, 0001.txt, 0001.json. Names are unique within a shard, so an image is named SHARD/0001.jpg in the table.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from library.bounded import json_of
from library.data.image_files import BadImage, readable_extensions
from library.data.scan.caption_files import decode_caption, normal_extensions
from library.data.scan.image_headers import read_header
from library.data.scan.index import MaskValues
from library.data.scan.mask_files import same_aspect_ratio
from library.data.scan.mask_values import MaskSource, read_values
from library.data.scan.pairing import MASK_LABEL
from library.data.shards.archive import Loaded, Place, Skipped, files_in
from library.data.shards.member import hash_of
from library.data.shards.pack import Report, row_of
from library.data.shards.places import Places, join, name_of
from library.data.shards.table import Row, ShardEntry, write_table
from library.messages import without_secrets
from library.options.convert_values import is_remote
from library.options.mistakes import Mistake, UserError
from library.runtime.progress import ProgressBar

_JSON = ".json"
_MASK = ".mask"
_THREADS = 4  # shards that are read at a time


@dataclass(frozen=True)
class Captions:
    """How captions are found: endings in order of preference, their encoding, and the key of a .json file."""

    extensions: str = ".txt,.caption"
    encoding: str = "utf-8"
    key: str = "caption"


def index_shards(places: Places, table: Path, captions: Captions, most_memory: float) -> Report:
    """Read all shards once and write their table. Raises UserError with all mistakes."""
    names = places.names or ()
    bases = [name.rpartition("/")[2] for name in names]
    if len(set(bases)) < len(bases):
        raise UserError([Mistake("two of the shards have the same name", "give each shard a name of its own")])
    reading = _Reading(places.root, names, captions, most_memory)
    try:
        count = write_table(table, name_of(places.root), reading.entries(), reading.rows())
    except OSError as error:
        what = f"the table {table} cannot be written ({error.strerror or error})"
        raise UserError([Mistake(what, "give a folder that can be written: --output_dir")]) from error
    report = reading.report
    if count < report.images:
        report.notes.append(f"{report.images - count} x second file of one name in its shard; the first is used")
        report.images = count
    return report


@dataclass
class _Reading:
    """Reads shards, several at a time, and counts what is not used."""

    root: str
    names: Sequence[str]
    captions: Captions
    most_memory: float
    report: Report = field(default_factory=Report)
    _lengths: list[int] = field(default_factory=list)
    _not_used: Counter[str] = field(default_factory=Counter)

    def entries(self) -> Iterator[ShardEntry]:
        """The shards, when their rows have been read."""
        for number, (name, length) in enumerate(zip(self.names, self._lengths, strict=True)):
            yield ShardEntry(number, name, length)

    def rows(self) -> Iterator[Row]:
        """The rows of all shards. Raises UserError with all mistakes at the end."""
        report = self.report
        with ThreadPoolExecutor(_THREADS) as pool, ProgressBar("reading shards", len(self.names)) as bar:
            try:
                for found in pool.map(self._read, range(len(self.names)), self.names):
                    report.bad |= found.bad
                    report.mistakes.extend(found.mistakes)
                    report.images += len(found.rows)
                    self._lengths.append(found.length)
                    self._not_used += found.not_used
                    yield from found.rows
                    found.rows.clear()
                    bar.update()
            finally:
                pool.shutdown(cancel_futures=True)
        report.notes += [f"{count} x {what}" for what, count in self._not_used.items()]
        report.shards, report.size = len(self._lengths), sum(self._lengths)
        report.check_bad()
        if not report.images and not report.mistakes:
            report.mistakes.add("the shards contain no image", "name others")
        if report.mistakes:
            raise UserError(report.mistakes)

    def _read(self, number: int, name: str) -> _Shard:
        place = join(self.root, name)
        shard = _Shard(place, name.rpartition("/")[2].removesuffix(".tar"), number, self.captions, self.most_memory)
        try:
            shard.length = _length_of(place)
            shard.read()
        except UserError as error:
            shard.mistakes += error.mistakes
        except OSError as error:
            shard.mistakes.append(
                Mistake(
                    f"shard {without_secrets(place)} cannot be read ({error.strerror or error})",
                    "check the name, and for a URL the credentials",
                )
            )
        return shard


def _length_of(place: str) -> int:
    if is_remote(place):
        from library.data.shards.remote import length_of

        return length_of(place)
    return os.stat(place).st_size


class _Image(NamedTuple):
    row: Row
    stem: str  # its name without extension
    key: str  # its name up to the first point
    extension: str  # what follows the key


class _Mask(NamedTuple):
    name: str
    offset: int
    length: int
    content: bytes
    size: tuple[int, int]
    values: MaskValues


@dataclass
class _Shard:
    """One shard, and what is found in it."""

    place: str
    name: str  # without extension
    number: int
    captions: Captions
    most_memory: float
    length: int = 0
    rows: list[Row] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    not_used: Counter[str] = field(default_factory=Counter)
    _images: list[_Image] = field(default_factory=list)
    _texts: dict[str, bytes] = field(default_factory=dict)  # by name, the ending in lower case
    _masks: dict[str, _Mask] = field(default_factory=dict)  # by the stem of their image

    @property
    def shown(self) -> str:
        """What names it in messages."""
        return without_secrets(self.place)

    def read(self) -> None:
        """Read all files once. Raises UserError for a damaged archive, OSError for one that cannot be read."""
        texts = (*(ending.lower() for ending in normal_extensions(self.captions.extensions)), _JSON)
        skipped = Skipped()
        for found in files_in(self.place, sorted(readable_extensions()), texts, skipped):
            if found.name.lower().endswith(texts):
                if found.data is None:
                    self.not_used["text of more than a megabyte"] += 1
                else:
                    ending = max(len(text) for text in texts if found.name.lower().endswith(text))
                    self._texts.setdefault(found.name[:-ending] + found.name[-ending:].lower(), found.data)
            else:
                self._add_image(found.name, found.offset, found.data or b"")
        self.not_used["link or device, which is not read"] += skipped.links
        self.not_used["file named outside of the archive, which is not read"] += skipped.outside
        plain = {image.key for image in self._images if "." not in image.extension}
        for image in self._images:
            if "." in image.extension and image.key in plain:
                self.not_used["second image of a sample, such as KEY.depth.png"] += 1
            else:
                self.rows.append(self._complete(image))
        self.not_used = +self.not_used  # without zeros

    def _add_image(self, name: str, offset: int, data: bytes) -> None:
        folder, _, base = name.rpartition("/")
        key, _, extension = base.partition(".")
        stem = name.rpartition(".")[0]
        label = next((ending for ending in (_MASK, MASK_LABEL) if stem.lower().endswith(ending)), None)
        try:
            header = read_header(Loaded(data, name), self.most_memory)
        except BadImage as error:
            self.bad[f"{self.shown}/{name}"] = str(error)
            return
        place = Place(self.number, offset)
        if label is None:
            row = row_of(f"{self.name}/{name}", data, place, header, None)
            self._images.append(_Image(row, stem, f"{folder}/{key}", extension))
            return
        values = read_values(MaskSource(Loaded(data, name), transparency=False))
        if isinstance(values, MaskValues):
            self._masks[stem[: -len(label)]] = _Mask(name, offset, len(data), hash_of(data), header.size, values)
        else:
            self.bad[f"{self.shown}/{name}"] = values

    def _complete(self, image: _Image) -> Row:
        """The row with caption and mask."""
        row = image.row._replace(caption=self._caption(image))
        mask = self._masks.get(image.stem) or self._masks.get(image.key.removeprefix("/"))
        if mask is None:
            return row
        if not same_aspect_ratio(mask.size, (row.width, row.height)):
            what = f"mask {self.shown}/{mask.name} is {mask.size[0]}x{mask.size[1]}, its image {row.width}x{row.height}"
            self.mistakes.append(Mistake(what, "resize it to the size or aspect ratio of its upright image"))
        return row._replace(
            mask=mask.name, mask_shard=self.number, mask_offset=mask.offset, mask_length=mask.length,
            mask_content=mask.content, mask_values=mask.values,
        )  # fmt: skip

    def _caption(self, image: _Image) -> str | None:
        """The text of an image: of its caption file, else of its .json file."""
        stems = dict.fromkeys((image.stem, image.key.removeprefix("/")))
        for ending in normal_extensions(self.captions.extensions):
            for stem in stems:
                if (data := self._texts.get(stem + ending.lower())) is not None:
                    try:
                        return decode_caption(f"{self.shown}/{stem}{ending}", data, self.captions.encoding)
                    except UserError as error:
                        self.mistakes += error.mistakes
                        return None
        for stem in stems:
            text = _from_json(self._texts.get(stem + _JSON), self.captions.key)
            if text is not None:
                return text
        self.not_used["image without a caption, which gets the class tokens"] += 1
        return None


def _from_json(data: bytes | None, key: str) -> str | None:
    try:
        value = None if data is None else json_of(data).get(key)
    except (ValueError, AttributeError):
        return None
    return value if isinstance(value, str) else None
