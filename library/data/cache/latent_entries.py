"""What latents a run wants, under which names they may lie, and whether a file that is there may be used.

A file of ours is up to date when its note names the same settings (the VAE, the part that is shown, what transparency
is laid on, where the mask comes from) and the content of the same image and mask.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from library.data import images
from library.data.buckets import Placement
from library.data.cache import latent_files
from library.data.cache.latent_files import Entry, Note
from library.data.images import Geometry
from library.data.scan.scan import ImageRecord

CacheFormat = Literal["safetensors", "npz"]
Verdict = Literal["missing", "stale", "half", "current", "foreign"]
"""half: all but the latents of the mirror image; foreign: of another program, and trusted."""

_VERSION = 2  # raise it when pixels or latents of the same image come out differently


@dataclass(frozen=True)
class LatentSource:
    """All that latents depend on besides the image's bytes and the VAE: the part that is shown (not mirrored), what
    transparency is laid on (RGB), and where the mask comes from."""

    shown: Geometry
    background: tuple[int, int, int] = (255, 255, 255)
    mask: Path | None = None
    alpha_mask: bool = False  # the image's own transparency; a mask file comes first


@dataclass(frozen=True, slots=True)
class Wanted:
    """One entry of the cache. Records of the same image, settings and VAE share one."""

    number: int  # its place among all that are wanted
    record: int  # index of a record that wants it
    image: str
    mask: str | None
    alpha_mask: bool
    size: tuple[int, int]
    shown: Geometry
    transparent: bool
    settings: str
    flip: bool  # whether any of its records wants the mirror image too

    @property
    def masked(self) -> bool:
        """Whether it may have a mask."""
        return self.mask is not None or self.alpha_mask

    @property
    def folder(self) -> str:
        """The image's folder, in which the entry lies too."""
        return os.path.dirname(self.image)

    @property
    def name(self) -> str:
        """The image's file name."""
        return os.path.basename(self.image)


def wanted_by(
    records: Sequence[ImageRecord], source: Callable[[int], LatentSource], flip: Sequence[bool], vae: str
) -> tuple[list[Wanted], list[int]]:
    """The entries that the records want, and per record the number of its entry."""
    entries: dict[tuple[str, str | None, str], Wanted] = {}
    flips: dict[tuple[str, str | None, str], bool] = {}
    shown: dict[Geometry, Geometry] = {}  # a hundred thousand images have few different ones
    settings_of: dict[str, str] = {}
    of_record = []
    for index, record in enumerate(records):
        chosen = source(index)
        image, mask = str(record.path), None if chosen.mask is None else str(chosen.mask)
        alpha = chosen.alpha_mask and mask is None
        settings = _settings(record, chosen, vae, "file" if mask else "alpha" if alpha else "none")
        settings = settings_of.setdefault(settings, settings)
        spot = (image, mask, settings)
        flips[spot] = flips.get(spot, False) or flip[index]
        if spot not in entries:
            entries[spot] = Wanted(
                number=len(entries), record=index, image=image, mask=mask, alpha_mask=alpha, size=record.size,
                shown=shown.setdefault(chosen.shown, chosen.shown), transparent=record.transparent, settings=settings,
                flip=False,
            )  # fmt: skip
        of_record.append(entries[spot].number)
    return [replace(entry, flip=True) if flips[spot] else entry for spot, entry in entries.items()], of_record


def _settings(record: ImageRecord, source: LatentSource, vae: str, mask: str) -> str:
    """A digest of all that the latents depend on besides the bytes of files. What has no effect on this image is not
    part of it: how it would be scaled if it were, what would lie behind it if it were transparent."""
    shown = source.shown
    interpolation = shown.interpolation if shown.resized != record.size else None
    background = source.background if record.transparent else None
    parts = (_VERSION, vae, shown.bucket, shown.resized, shown.offset, interpolation, background, mask)
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class Look(NamedTuple):
    """What was found of an entry: the file that counts, and for one that may be used the key of its content."""

    verdict: Verdict
    file: str
    key: str = ""


@dataclass(frozen=True)
class Files:
    """The cache files of a run: their names and who may be trusted. As the arguments of cache.fill."""

    suffix: str
    format: CacheFormat
    trust_foreign: bool
    skip_check: bool
    channels: int | None
    stride: int
    spots: Mapping[tuple[str, str, tuple[int, int]], int]  # entries for each name that sd-scripts would give

    def target(self, entry: Wanted) -> str:
        """The file that the entry is written to."""
        return next(self._candidates(entry))

    def _candidates(self, entry: Wanted) -> Iterator[str]:
        """Where an entry may lie, the file to write first. An .npz has the name that sd-scripts gives unless others
        want it too: a.jpg beside a.png, the same image at another resolution."""
        if self.format == "safetensors":
            name = latent_files.own_name(entry.name, entry.shown.bucket, entry.settings, self.suffix)
            yield os.path.join(entry.folder, name)
        names = [
            latent_files.npz_name(entry.name, entry.size, self.suffix),
            latent_files.full_npz_name(entry.name, entry.size, entry.shown.bucket, entry.settings, self.suffix),
        ]
        for name in reversed(names) if self._shares_its_name(entry) else names:
            yield os.path.join(entry.folder, name)

    def _shares_its_name(self, entry: Wanted) -> bool:
        return self.spots.get(_spot(entry), 0) > 1

    def look(self, entry: Wanted) -> Look:
        """Find an entry. One of which only the stamps are out of date is noted anew on the way."""
        judge = self._glance if self.skip_check else self._examine
        looks: list[Look] = []
        for file in self._candidates(entry):
            look = judge(file, entry)
            if look.verdict in ("current", "foreign"):
                return look
            looks.append(look)
        for look in looks:
            if look.verdict == "half":
                return look
        told = looks[:1] if self._shares_its_name(entry) else looks  # under a shared name others have theirs
        return Look("stale" if any(look.verdict == "stale" for look in told) else "missing", self.target(entry))

    def _glance(self, file: str, entry: Wanted) -> Look:
        """By shapes alone."""
        found = latent_files.shapes(file)
        if found is None:
            return _useless(file)
        shapes, note = found
        trusted = note is not None or (self.trust_foreign and not self._shares_its_name(entry))
        if not trusted or not self._has_shapes(shapes, entry):
            return Look("stale", file)
        return Look("foreign" if note is None else "current", file, key_of(file, note))

    def _has_shapes(self, shapes: Mapping[str, tuple[int, ...]], entry: Wanted) -> bool:
        width, height = entry.shown.bucket
        latent = shapes.get("latents", ())
        return (
            len(latent) == 3
            and latent[0] == (self.channels or latent[0])
            and latent[1:] == (height // self.stride, width // self.stride)
            and (not entry.flip or shapes.get("latents_flipped") == latent)
        )

    def _examine(self, file: str, entry: Wanted) -> Look:
        """By all that there is."""
        found = latent_files.read(file)
        if found is None:
            return _useless(file)
        if found.note is None:
            fits = self.trust_foreign and self._fits_foreign(file, found, entry)
            return Look("foreign", file, key_of(file, None)) if fits else Look("stale", file)
        note = found.note
        if note.settings != entry.settings or (note.mask is None) != (entry.mask is None):
            return Look("stale", file)
        try:
            image = note.image.again(entry.image)
            mask = note.mask.again(entry.mask) if note.mask is not None and entry.mask is not None else None
        except OSError:
            return Look("stale", file)  # reading it will tell
        now = Note(entry.settings, image, mask, note.sums)
        if now.key != note.key or "latents" not in found.arrays:
            return Look("stale", file)
        if now != note and (image.stamp, mask.stamp if mask else None) != (None, None):
            with contextlib.suppress(OSError):  # then it is read again the next time
                latent_files.write(file, found.arrays, entry.settings, image, mask)
        complete = not entry.flip or "latents_flipped" in found.arrays
        return Look("current" if complete else "half", file, note.key)

    def _fits_foreign(self, file: str, found: Entry, entry: Wanted) -> bool:
        """Whether another program that follows sd-scripts' rules would have made this of the image as it is.

        A transparent image it trains with the colours hidden in it, which only a mask of the same transparency makes
        good. Of several entries that want the file's name nobody can tell whose it is.
        """
        arrays, shown = found.arrays, entry.shown
        shapes = {name: array.shape for name, array in arrays.items()}
        bucket = (shown.bucket[1], shown.bucket[0])
        centre = images.centre_offset(Placement(shown.bucket, shown.resized))
        if entry.mask or self._shares_its_name(entry) or shown.offset != centre:
            return False
        if shown.interpolation is not None and shown.resized != entry.size:
            return False
        if shapes.get("alpha_mask") != bucket if entry.alpha_mask else entry.transparent:
            return False
        if not self._has_shapes(shapes, entry) or not _is_size(arrays.get("original_size"), entry.size):
            return False
        used = ["latents"] + ["latents_flipped"] * entry.flip + ["alpha_mask"] * entry.alpha_mask
        if not all(arrays[name].dtype.kind == "f" and np.isfinite(arrays[name]).all() for name in used):
            return False
        try:
            return os.stat(file).st_mtime_ns >= os.stat(entry.image).st_mtime_ns
        except OSError:
            return False


def _is_size(array: latent_files.Array | None, size: tuple[int, int]) -> bool:
    return array is None or array.tolist() == list(size)


def _useless(file: str) -> Look:
    return Look("stale" if os.path.lexists(file) else "missing", file)


def key_of(file: str, note: Note | None) -> str:
    """What a file holds; of another program's, when it was written. "" if it is gone."""
    if note is not None:
        return note.key
    try:
        status = os.stat(file)
    except OSError:
        return ""
    return f"foreign {status.st_size} {status.st_mtime_ns}"


def names_wanted(entries: Iterable[Wanted]) -> Counter[tuple[str, str, tuple[int, int]]]:
    """How many entries want each name of sd-scripts. Without case, as some file systems are."""
    return Counter(_spot(entry) for entry in entries)


def _spot(entry: Wanted) -> tuple[str, str, tuple[int, int]]:
    return entry.folder, os.path.splitext(entry.name)[0].casefold(), entry.size
