"""List the cache entries that a run needs, name their files, and check whether an existing file is up to date.

A file written by this trainer is up to date if its fingerprint has the same settings (VAE, scaling and crop, background
of transparency, conversion to sRGB, source of the mask) and the same hashes of image and mask.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from library.data import images
from library.data.buckets import Placement
from library.data.cache import latent_files
from library.data.cache.latent_files import Entry, FileHash, Fingerprint
from library.data.image_files import ImageSource
from library.data.images import Geometry
from library.data.scan.image_record import ImageRecord
from library.data.shards.member import Member

CacheFormat = Literal["safetensors", "npz"]
Status = Literal["missing", "outdated", "incomplete", "current", "third_party"]
"""incomplete: only the latents of the mirror image are missing; third_party: from another program, and usable."""

_VERSION = 2  # increase when the same image gives different pixels or latents


@dataclass(frozen=True)
class LatentSource:
    """Everything that latents depend on besides the image's bytes and the VAE: scaling and crop (not mirrored), the
    background of transparency (RGB), and the source of the mask."""

    geometry: Geometry
    background: tuple[int, int, int] = (255, 255, 255)
    mask: ImageSource | None = None
    alpha_mask: bool = False  # the image's transparency is the mask, unless there is a mask file


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """An entry of the cache. Records with the same image, settings and VAE share one."""

    number: int  # its index among all entries
    record: int  # index of a record that uses it
    image: str
    mask: str | None
    alpha_mask: bool
    size: tuple[int, int]
    geometry: Geometry
    transparent: bool
    converted: bool  # to sRGB, by its colour profile
    settings: str
    flip: bool  # whether any of its records needs the mirror image
    kept: tuple[str, str] | None = None  # folder and name of the cache file of an image in a shard
    content: str | None = None  # hash of an image in a shard, by the table; None: a file, which is hashed
    mask_content: str | None = None

    @property
    def masked(self) -> bool:
        """Whether it may have a mask."""
        return self.mask is not None or self.alpha_mask

    @property
    def folder(self) -> str:
        """The folder of the cache file: that of the image, or for one in a shard that of the shard's caches."""
        return os.path.dirname(self.image) if self.kept is None else self.kept[0]

    @property
    def name(self) -> str:
        """The image's file name."""
        return os.path.basename(self.image) if self.kept is None else self.kept[1]


def list_entries(
    records: Sequence[ImageRecord], source: Callable[[int], LatentSource], flip: Sequence[bool], vae: str
) -> tuple[list[CacheEntry], list[int]]:
    """List the entries of the records, and per record the number of its entry."""
    entries: dict[tuple[str, str | None, str], CacheEntry] = {}
    flips: dict[tuple[str, str | None, str], bool] = {}
    geometries: dict[Geometry, Geometry] = {}  # share equal objects
    settings_of: dict[str, str] = {}
    of_record = []
    for index, record in enumerate(records):
        chosen = source(index)
        image, mask = str(record.path), None if chosen.mask is None else str(chosen.mask)
        alpha = chosen.alpha_mask and mask is None
        settings = _settings(record, chosen, vae, "luminance" if mask else "alpha" if alpha else "none")
        settings = settings_of.setdefault(settings, settings)
        key = (image, mask, settings)
        flips[key] = flips.get(key, False) or flip[index]
        if key not in entries:
            entries[key] = CacheEntry(
                number=len(entries), record=index, image=image, mask=mask, alpha_mask=alpha, size=record.size,
                geometry=geometries.setdefault(chosen.geometry, chosen.geometry), transparent=record.transparent,
                converted=record.profile == "converted",
                settings=settings, flip=False, kept=_kept_in(record.path), content=_content(record.path),
                mask_content=_content(chosen.mask),
            )  # fmt: skip
        of_record.append(entries[key].number)
    return [replace(entry, flip=True) if flips[key] else entry for key, entry in entries.items()], of_record


def _kept_in(source: ImageSource) -> tuple[str, str] | None:
    return (source.shard.caches, source.cache_name) if isinstance(source, Member) else None


def _content(source: ImageSource | None) -> str | None:
    return source.content.hex() if isinstance(source, Member) else None


def _settings(record: ImageRecord, source: LatentSource, vae: str, mask: str) -> str:
    """A hash of everything that latents depend on besides file contents. Leaves out what has no effect on this image:
    the interpolation if it is not scaled, the background if it is opaque."""
    geometry = source.geometry
    interpolation = geometry.interpolation if geometry.resized != record.size else None
    background = source.background if record.transparent else None
    profile = ("sRGB",) if record.profile == "converted" else ()
    parts = (
        _VERSION,
        vae,
        geometry.bucket,
        geometry.resized,
        geometry.offset,
        interpolation,
        background,
        mask,
        *profile,
    )
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class Lookup(NamedTuple):
    """Result of looking up an entry: its status, its file, and for a usable file the key of its contents."""

    status: Status
    file: str
    key: str = ""


@dataclass(frozen=True)
class CacheFiles:
    """Names and checks the cache files of a run. Fields as the arguments of build_latent_cache."""

    suffix: str
    format: CacheFormat
    trust_third_party: bool
    skip_check: bool
    channels: int | None
    stride: int
    npz_name_counts: Mapping[tuple[str, str, tuple[int, int]], int]  # entries per file name of sd-scripts

    def target(self, entry: CacheEntry) -> str:
        """The file to write the entry to."""
        return next(self._candidates(entry))

    def _candidates(self, entry: CacheEntry) -> Iterator[str]:
        """Possible files of an entry, the one to write first. An .npz has its sd-scripts name unless several entries
        would share it: a.jpg next to a.png, or one image at several resolutions."""
        if self.format == "safetensors":
            name = latent_files.own_name(entry.name, entry.geometry.bucket, entry.settings, self.suffix)
            yield os.path.join(entry.folder, name)
        names = [
            latent_files.npz_name(entry.name, entry.size, self.suffix),
            latent_files.full_npz_name(entry.name, entry.size, entry.geometry.bucket, entry.settings, self.suffix),
        ]
        for name in reversed(names) if self._npz_name_is_shared(entry) else names:
            yield os.path.join(entry.folder, name)

    def _npz_name_is_shared(self, entry: CacheEntry) -> bool:
        return self.npz_name_counts.get(_npz_name_key(entry), 0) > 1

    def find(self, entry: CacheEntry) -> Lookup:
        """Look up an entry. If only the stamps in its file are outdated, updates them."""
        check = self._check_shapes if self.skip_check else self._check_contents
        lookups: list[Lookup] = []
        for file in self._candidates(entry):
            lookup = check(file, entry)
            if lookup.status in ("current", "third_party"):
                return lookup
            lookups.append(lookup)
        for lookup in lookups:
            if lookup.status == "incomplete":
                return lookup
        own = lookups[:1] if self._npz_name_is_shared(entry) else lookups  # a shared name may be that of another entry
        return Lookup(
            "outdated" if any(lookup.status == "outdated" for lookup in own) else "missing", self.target(entry)
        )

    def _check_shapes(self, file: str, entry: CacheEntry) -> Lookup:
        """Check only the shapes."""
        found = latent_files.shapes(file)
        if found is None:
            return _unreadable_file(file)
        shapes, fingerprint = found
        trusted = fingerprint is not None or (self.trust_third_party and not self._npz_name_is_shared(entry))
        if not trusted or not self._has_shapes(shapes, entry):
            return Lookup("outdated", file)
        return Lookup("third_party" if fingerprint is None else "current", file, key_of(file, fingerprint))

    def _has_shapes(self, shapes: Mapping[str, tuple[int, ...]], entry: CacheEntry) -> bool:
        width, height = entry.geometry.bucket
        latent = shapes.get("latents", ())
        return (
            len(latent) == 3
            and latent[0] == (self.channels or latent[0])
            and latent[1:] == (height // self.stride, width // self.stride)
            and (not entry.flip or shapes.get("latents_flipped") == latent)
        )

    def _check_contents(self, file: str, entry: CacheEntry) -> Lookup:
        """Check fingerprint and contents."""
        found = latent_files.read(file)
        if found is None:
            return _unreadable_file(file)
        if found.fingerprint is None:
            fits = self.trust_third_party and self._fits_third_party(file, found, entry)
            return Lookup("third_party", file, key_of(file, None)) if fits else Lookup("outdated", file)
        fingerprint = found.fingerprint
        if fingerprint.settings != entry.settings or (fingerprint.mask is None) != (entry.mask is None):
            return Lookup("outdated", file)
        try:
            image = hash_source(entry.image, entry.content, fingerprint.image)
            mask = (
                hash_source(entry.mask, entry.mask_content, fingerprint.mask)
                if fingerprint.mask is not None and entry.mask is not None
                else None
            )
        except OSError:
            return Lookup("outdated", file)  # reported when the image is read
        now = Fingerprint(entry.settings, image, mask, fingerprint.sums)
        if now.key != fingerprint.key or "latents" not in found.arrays:
            return Lookup("outdated", file)
        if now != fingerprint and (image.stamp, mask.stamp if mask else None) != (None, None):
            with contextlib.suppress(OSError):  # then the next run hashes the image again
                latent_files.write(file, found.arrays, entry.settings, image, mask)
        complete = not entry.flip or "latents_flipped" in found.arrays
        return Lookup("current" if complete else "incomplete", file, fingerprint.key)

    def _fits_third_party(self, file: str, found: Entry, entry: CacheEntry) -> bool:
        """Whether sd-scripts, or a program with its rules, would create this file from the current image.

        sd-scripts ignores colour profiles. It encodes the hidden colours of transparent areas, which is harmless only
        if transparency is the mask.
        A file name shared by several entries is ambiguous.
        """
        arrays, geometry = found.arrays, entry.geometry
        shapes = {name: array.shape for name, array in arrays.items()}
        bucket = (geometry.bucket[1], geometry.bucket[0])
        centre = images.centre_offset(Placement(geometry.bucket, geometry.resized))
        if entry.mask or entry.converted or self._npz_name_is_shared(entry) or geometry.offset != centre:
            return False
        if geometry.interpolation is not None and geometry.resized != entry.size:
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


def hash_source(path: str, content: str | None, known: FileHash | None = None) -> FileHash:
    """The hash of an image: `content` if the table of its shard has it; else of the file, or `known` if its stamp has
    not changed. Raises OSError."""
    if content is not None:
        return FileHash(content, None)
    return FileHash.of_file(path) if known is None else known.refreshed(path)


def _is_size(array: latent_files.Array | None, size: tuple[int, int]) -> bool:
    return array is None or array.tolist() == list(size)


def _unreadable_file(file: str) -> Lookup:
    return Lookup("outdated" if os.path.lexists(file) else "missing", file)


def key_of(file: str, fingerprint: Fingerprint | None) -> str:
    """Key of a file's contents; for another program's file, its length and mtime, "" if it does not exist."""
    if fingerprint is not None:
        return fingerprint.key
    try:
        status = os.stat(file)
    except OSError:
        return ""
    return f"foreign {status.st_size} {status.st_mtime_ns}"


def count_npz_names(entries: Iterable[CacheEntry]) -> Counter[tuple[str, str, tuple[int, int]]]:
    """Entries per file name of sd-scripts, ignoring case like some file systems."""
    return Counter(_npz_name_key(entry) for entry in entries)


def _npz_name_key(entry: CacheEntry) -> tuple[str, str, tuple[int, int]]:
    return entry.folder, os.path.splitext(entry.name)[0].casefold(), entry.size
