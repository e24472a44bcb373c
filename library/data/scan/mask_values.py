"""Read how much of an image each mask counts. This decodes the masks, once per file: the index remembers the result.

Imports neither torch nor numpy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from library.data.image_files import BadImage, ImageSource
from library.data.scan.image_record import ImageRecord
from library.data.scan.index import Index, MaskValues, Stamp
from library.data.shards.member import Member
from library.options.datasets import SubsetSpec
from library.options.groups.dataset import DatasetOptions
from library.runtime.progress import ProgressBar

if TYPE_CHECKING:
    from PIL.Image import Image

_BLOCK = 512  # masks between writes to the index
_COLOURED = 16  # least difference of two channels: a grey JPEG may have small ones


class MaskSource(NamedTuple):
    """Where a mask comes from: a mask file, or the transparency of an image."""

    path: ImageSource
    transparency: bool


def mask_source(record: ImageRecord, subset: SubsetSpec) -> MaskSource | None:
    """The mask of a record of this subset; None if it has none. A mask file overrides transparency."""
    folder = subset.mask_folder
    if record.mask_member is not None:
        return MaskSource(record.mask_member, transparency=False)
    if record.mask is not None and folder is not None:
        return MaskSource(folder / record.mask, transparency=False)
    return MaskSource(record.path, transparency=True) if subset.alpha_mask and record.transparent else None


def read_masks(
    sources: Iterable[MaskSource],
    index: Path | None,
    *,
    progress: bool = False,
    most_memory: float = DatasetOptions.max_image_memory,
) -> dict[MaskSource, MaskValues | str]:
    """The values of each mask, or why it cannot be read. `index`: folder of the index kept between scans;
    `most_memory`: GiB that a decoded mask may need."""
    sources = list(sources)
    found: dict[MaskSource, MaskValues | str] = {}
    for source in sources:
        if isinstance(source.path, Member) and source.path.values is not None:
            found[source] = source.path.values  # from the table of the shards
    with Index(index) as stored:
        files = [source for source in dict.fromkeys(sources) if source not in found]
        stamps = {source: stamp for source in files if (stamp := _stamp(source.path)) is not None}
        for folder, group in _by_folder(stamps).items():
            known = stored.masks(*folder, {_name(source): stamps[source] for source in group})
            found |= {source: known[_name(source)] for source in group if _name(source) in known}
        new = [source for source in files if source not in found]
        read = partial(read_values, most_memory=most_memory)
        pool = ThreadPoolExecutor(min(16, 2 + (os.cpu_count() or 1)), "masks")
        try:
            with ProgressBar("reading masks", len(new), unit=" files", delay=1, shown=progress) as bar:
                for start in range(0, len(new), _BLOCK):
                    block = new[start : start + _BLOCK]
                    for source, values in zip(block, pool.map(read, block), strict=True):
                        found[source] = values
                        bar.update()
                    _store(stored, block, found, stamps)
        finally:
            pool.shutdown(cancel_futures=True)
    return found


def _name(source: MaskSource) -> str:
    return os.path.basename(str(source.path))


def _stamp(path: ImageSource) -> Stamp | None:
    if not isinstance(path, Path):
        return None  # in a shard: it has no entry in the index
    try:
        status = os.stat(path)
    except OSError:
        return None  # reported when it is read
    return status.st_size, status.st_mtime_ns


def _by_folder(sources: Iterable[MaskSource]) -> dict[tuple[str, bool], list[MaskSource]]:
    """(absolute path of the folder, transparency) -> masks."""
    groups: dict[tuple[str, bool], list[MaskSource]] = {}
    for source in sources:
        groups.setdefault((os.path.dirname(os.path.abspath(str(source.path))), source.transparency), []).append(source)
    return groups


def _store(
    index: Index,
    block: Iterable[MaskSource],
    found: Mapping[MaskSource, MaskValues | str],
    stamps: Mapping[MaskSource, Stamp],
) -> None:
    for folder, group in _by_folder(source for source in block if source in stamps).items():
        index.store_masks(
            *folder,
            [
                (_name(source), stamps[source], values)
                for source in group
                if isinstance(values := found[source], MaskValues)
            ],
        )


def read_values(source: MaskSource, most_memory: float = DatasetOptions.max_image_memory) -> MaskValues | str:
    """The values of a mask, or why it cannot be read. `most_memory`: GiB that it may need when decoded."""
    from library.data import decoding

    try:
        convert = _opacity_values if source.transparency else _luminance_values
        return decoding.read(source.path, convert, most_memory)
    except BadImage as error:
        return str(error)


def _opacity_values(image: Image) -> MaskValues:
    from library.data.decoding import opacity

    return _values(opacity(image), coloured=False)


def _luminance_values(image: Image) -> MaskValues:
    from library.data.decoding import luminance

    return _values(luminance(image), coloured=_is_coloured(image))


def _values(mask: Image, *, coloured: bool) -> MaskValues:
    counts = mask.histogram()
    present = [value for value, count in enumerate(counts) if count]
    mean = sum(value * count for value, count in enumerate(counts)) / (255 * sum(counts))
    return MaskValues(mean, present[0], present[-1], coloured)


def _is_coloured(image: Image) -> bool:
    if image.mode in ("1", "L", "LA") or image.mode.startswith("I"):
        return False
    from PIL import ImageChops

    red, green, blue = image.convert("RGB").split()
    return any(any(ImageChops.difference(red, other).histogram()[_COLOURED:]) for other in (green, blue))
