"""Pack a folder of images with captions and masks into shards, and write their table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from library.data.image_files import BadImage, readable_extensions
from library.data.scan.caption_files import decode_caption
from library.data.scan.gather import Gathered, ImageFile, caption_endings, check_masks, gather
from library.data.scan.image_headers import Header, read_header
from library.data.scan.index import MaskValues
from library.data.scan.listing import Directories
from library.data.scan.mask_files import same_aspect_ratio
from library.data.scan.mask_values import MaskSource, read_values
from library.data.shards.archive import Loaded, Place, ShardWriter
from library.data.shards.member import TABLE_NAME, hash_of
from library.data.shards.table import Row, ShardEntry, is_inside, write_table
from library.limits import CAPTION_FILE
from library.messages import counted
from library.options.datasets import SubsetSpec
from library.options.mistakes import Mistake, Mistakes, UserError
from library.runtime.progress import ProgressBar
from library.whole_files import remove_leftovers

MOST_BAD = 0.1  # share of unusable images above which nothing is written


@dataclass
class Report:
    """What was written, and what was left out."""

    images: int = 0
    shards: int = 0
    size: int = 0  # bytes
    bad: dict[str, str] = field(default_factory=dict)  # image -> why it cannot be used
    notes: list[str] = field(default_factory=list)
    mistakes: Mistakes = field(default_factory=Mistakes)

    def check_bad(self) -> None:
        """Raise UserError for too many unusable images, or none that can be used."""
        total = len(self.bad) + self.images
        if self.bad and len(self.bad) > MOST_BAD * total:
            lines = [f"  {name}: {why}" for name, why in self.bad.items()][:20]
            what = f"{len(self.bad)} of {counted(total, 'image')} cannot be used, more than {MOST_BAD:.0%}:\n"
            raise UserError([Mistake(what + "\n".join(lines), "repair or remove them")])


def pack_folder(
    subset: SubsetSpec, output: Path, name: str, *, limit: int, most_memory: float, shares_masks: bool = False
) -> Report:
    """Pack the images of a subset into shards of `limit` bytes, `name`-000000.tar and so on in `output`, with a table.
    `shares_masks`: the mask folder has masks for other folders too.

    Raises UserError with all mistakes, before anything is written where they can be known.
    """
    if (output / TABLE_NAME).exists():
        raise UserError([Mistake(f"{output} has shards already", "give another --output_dir, or remove them")])
    extensions = readable_extensions()
    gathered = gather(subset, Directories(extensions, caption_endings([subset])), extensions)
    if not shares_masks:
        check_masks([subset], [gathered])
    report = Report(notes=list(gathered.notes), bad={str(path): why for path, why in gathered.unusable})
    report.mistakes.extend(gathered.mistakes)
    if gathered.other_captions is not None:
        report.mistakes.extend([gathered.other_captions.mistake])
    if report.mistakes:
        raise UserError(report.mistakes)
    remove_leftovers(output)
    writer = ShardWriter(output, name, limit)
    try:
        rows = _Packing(subset, gathered, writer, most_memory, report).rows()
        folder = subset.image_folder
        write_table(output / TABLE_NAME, folder.absolute().name if folder else name, _entries(writer), rows)
    except BaseException as error:
        _remove(writer, output)
        if not isinstance(error, OSError):
            raise
        what = f"--output_dir {output} cannot be written ({error.strerror or error})"
        raise UserError([Mistake(what, "free disk space or make the folder writable, then start again")]) from error
    report.shards, report.size = len(writer.entries), sum(entry.length for entry in writer.entries)
    return report


def _entries(writer: ShardWriter) -> Iterator[ShardEntry]:
    """The shards; read when all images are packed."""
    yield from writer.entries


def _remove(writer: ShardWriter, output: Path) -> None:
    """Shards without a table are of no use."""
    writer.abandon()
    for entry in writer.entries:
        (output / entry.path).unlink(missing_ok=True)


@dataclass
class _Packing:
    subset: SubsetSpec
    gathered: Gathered
    writer: ShardWriter
    most_memory: float
    report: Report
    _written: dict[str, None] = field(default_factory=dict)  # captions and masks of the images before

    def rows(self) -> Iterator[Row]:
        """Pack the images and yield the row of each. Raises UserError with all mistakes at the end."""
        with ProgressBar("packing images", len(self.gathered.images)) as bar:
            for image in self.gathered.images:
                row = self._pack(image)
                bar.update()
                if row is not None:
                    self.report.images += 1
                    yield row
        self.report.check_bad()
        if self.report.mistakes:
            raise UserError(self.report.mistakes)
        self.writer.close()

    def _pack(self, image: ImageFile) -> Row | None:
        path = Path(image.directory.path, image.base)
        if not (is_inside(image.name) and is_inside(self.gathered.masks.get(image.name, image.name))):
            self.report.bad[str(path)] = "in an archive, its name would be a path elsewhere: rename it"
            return None
        try:
            data = path.read_bytes()
            header = read_header(Loaded(data, image.base), self.most_memory)
        except (BadImage, OSError) as error:
            self.report.bad[str(path)] = str(error)
            return None
        prefix = image.name[: len(image.name) - len(image.base)]
        files = [Loaded(data, image.name)]
        text = image.text or None
        if image.caption_file is not None:
            caption = self._read(Path(image.directory.path, image.caption_file), CAPTION_FILE + 1)
            text = self._decode(Path(image.directory.path, image.caption_file), caption)
            if prefix + image.caption_file not in self._written:
                files.append(Loaded(caption, prefix + image.caption_file))
        mask, values = self._mask(image, header)
        if mask is not None:
            files.append(mask)
        self._written = dict.fromkeys([*list(self._written)[-64:], *(file.name for file in files)])
        places = self.writer.add(files)
        row = row_of(image.name, data, places[0], header, text, image.score)
        if mask is None:
            return row
        return row._replace(
            mask=self.gathered.masks[image.name], mask_shard=places[-1].shard, mask_offset=places[-1].offset,
            mask_length=len(mask.data), mask_content=hash_of(mask.data), mask_values=values,
        )  # fmt: skip

    def _mask(self, image: ImageFile, header: Header) -> tuple[Loaded | None, MaskValues | None]:
        """The mask of an image under its name in the shard, KEY.mask.png, and its values."""
        name = self.gathered.masks.get(image.name)
        if name is None:
            return None, None
        directory, base = self.gathered.mask_places[name]
        path = Path(directory.path, base)
        data = self._read(path)
        stem, _, ending = image.name.rpartition(".")
        mask = Loaded(data, f"{stem}.mask.{base.rpartition('.')[2]}")
        try:
            size = read_header(mask, self.most_memory).size
        except BadImage as error:
            self.report.mistakes.add(f"mask {path} cannot be used: {error}", "repair or remove it")
            return None, None
        if not same_aspect_ratio(size, header.size):
            what = f"mask {path} is {size[0]}x{size[1]}, its image {header.size[0]}x{header.size[1]}"
            self.report.mistakes.add(what, "resize it to the size or aspect ratio of its upright image")
        values = read_values(MaskSource(mask, transparency=False))
        if isinstance(values, str):
            self.report.mistakes.add(f"mask {path} cannot be used: {values}", "repair or remove it")
            return None, None
        return mask, values

    def _read(self, path: Path, most: int = -1) -> bytes:
        try:
            with path.open("rb") as file:
                return file.read(most)
        except OSError as error:
            self.report.mistakes.add(f"{path} cannot be read ({error.strerror or error})", "check its permissions")
            return b""

    def _decode(self, path: Path, data: bytes) -> str:
        try:
            return decode_caption(path, data, self.subset.caption_encoding)
        except UserError as error:
            self.report.mistakes.extend(error.mistakes)
            return ""


def row_of(name: str, data: bytes, place: Place, header: Header, text: str | None, score: float | None = None) -> Row:
    """The row of an image without a mask. Decodes an image that may be transparent, for its opacity."""
    values = read_values(MaskSource(Loaded(data, name), transparency=True)) if header.transparent else None
    return Row(
        name, place.shard, place.offset, len(data), hash_of(data), *header.size, header.transparent, header.profile,
        header.animated, text, score, alpha=values if isinstance(values, MaskValues) else None,
    )  # fmt: skip
