"""Encode latents once before training, in memory or in a file next to each image.

An entry is identified by everything that it depends on: the bytes of image and mask, scaling and crop, the background
of transparency, and the VAE. So an outdated entry is never used, and an unchanged image is not encoded again. Files
next to the images need no lock and no index: each is written atomically, has checksums (latent_files.py) and moves with
its image, and an interrupted run loses only the batch in progress. An image is hashed only if its stamp differs from
that in its entry, so checking the entries of 100,000 images reads no image.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from library.data import images, masks
from library.data.buckets import Placement
from library.data.cache import latent_files
from library.data.cache.latent_encoding import (
    THREADS,
    DecodedImage,
    Encode,
    EncodedImage,
    Encoder,
    Read,
    encode_all,
    read_image,
)
from library.data.cache.latent_entries import (
    CacheEntry,
    CacheFiles,
    CacheFormat,
    LatentSource,
    Lookup,
    count_npz_names,
    key_of,
    list_entries,
)
from library.data.cache.latent_files import Array, Fingerprint
from library.data.scan.image_record import ImageRecord
from library.messages import counted
from library.options.mistakes import Mistake, UserError
from library.runtime.processes import ALONE, Processes
from library.runtime.progress import ProgressBar
from library.whole_files import remove_leftovers

_CHUNK = 256  # entries that a thread checks at a time
_WRITING = 8  # most files in the write queue
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_MASKS = ("mask", "alpha_mask")  # at latent size in .safetensors, at bucket size in .npz


class CachedLatents(NamedTuple):
    """Cached latents (C, h, w) float32 and mask (1, h, w) float32 in [0, 1] or None."""

    latents: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True)
class MemoryLatents:
    """Latents (C, h, w) float32 per record, in memory; `flipped` and `masks` are empty if no record has any."""

    latents: tuple[torch.Tensor, ...]
    flipped: tuple[torch.Tensor | None, ...] = ()
    masks: tuple[torch.Tensor | None, ...] = ()

    def get(self, record: int, flipped: bool) -> CachedLatents:  # noqa: FBT001 - the key of a sample
        """Latents and mask of a record or its mirror image."""
        latents = self.flipped[record] if flipped else self.latents[record]
        if latents is None:
            raise ValueError(f"record {record} was cached without its mirror image")
        mask = self.masks[record] if self.masks else None
        return CachedLatents(latents, mask.flip(-1) if mask is not None and flipped else mask)


@dataclass(frozen=True)
class DiskLatents:
    """Latents on disk: per record its file, the key of its expected contents, and whether it has a mask."""

    files: tuple[str, ...]
    keys: tuple[str, ...]
    masked: tuple[bool, ...]

    def get(self, record: int, flipped: bool) -> CachedLatents:  # noqa: FBT001 - the key of a sample
        """As MemoryLatents.get. Raises UserError if the file was removed, damaged or replaced."""
        name = "latents_flipped" if flipped else "latents"
        file = self.files[record]
        entry = latent_files.read(file, {name, *_MASKS} if self.masked[record] else {name})
        if entry is None or name not in entry.arrays or key_of(file, entry.fingerprint) != self.keys[record]:
            what = f"latent cache {file} was removed, damaged or changed by another program during the run"
            raise UserError([Mistake(what, "start again, and do not change the cache during a run")])
        latents = torch.from_numpy(np.asarray(entry.arrays[name], dtype=np.float32))
        mask = _mask_of(entry.arrays, latents)
        return CachedLatents(latents, mask.flip(-1) if mask is not None and flipped else mask)


LatentStore = MemoryLatents | DiskLatents


@dataclass(frozen=True)
class LatentCacheBuild:
    """The latents of all records, with counts of entries (equal records share one)."""

    store: LatentStore
    read: int  # from up-to-date files
    encoded: int
    outdated: int  # of those encoded: a file existed but could not be used
    third_party: int = 0  # of those read: files of another program, which do not record image and VAE
    reencoded: int = 0  # of those encoded: again in full precision, because the latents were not finite

    def __str__(self) -> str:
        text = f"latents: {self.read} read, {self.encoded} encoded"
        text += f" ({self.outdated} of them because of outdated or damaged cache files)" if self.outdated else ""
        text += f"; {self.reencoded} encoded again in full precision" if self.reencoded else ""
        if self.third_party:
            files = counted(self.third_party, ".npz file")
            text += f"; {files} of another program used, which do not record their VAE: delete them if in doubt"
        return text


def build_latent_cache(  # noqa: PLR0913 - called once; each argument varies alone in tests
    records: Sequence[ImageRecord],
    placements: Sequence[Placement],
    read: Read,
    encode: Encode,
    *,
    vae: str,
    suffix: str,
    to_disk: bool,
    flip: Sequence[bool],
    source: Callable[[int], LatentSource] | None = None,
    batch_size: int = 1,
    cache_format: CacheFormat = "safetensors",
    encode_in_fp32: Encode | None = None,
    trust_third_party: bool = True,
    skip_check: bool = False,
    channels: int | None = None,
    stride: int = 8,
    share: tuple[int, int] = (0, 1),
    ranks: Processes = ALONE,
    progress: bool = True,
) -> LatentCacheBuild:
    """Return the latents of all records, encoding those without an up-to-date file.

    read            returns pixels and mask of a record as described by `source`, not mirrored; called in threads
    vae             identifies weights and precision of the VAE: VAEs that give different latents need different names
    suffix          the family's file name suffix as in sd-scripts: _sd.npz
    flip            per record, whether to cache its mirror image too; a file that lacks only that is completed
    source          per record; default: centre crop, no mask
    encode_in_fp32  `encode` in full precision, used for images whose latents are not finite
    trust_third_party  use an .npz of another program if shape, original size and arrays match, its latents are finite,
                    it is not older than the image, and that program prepares the image as in `source`: centre crop,
                    default scaling, opaque or masked by its transparency. The file does not record its VAE.
    skip_check      use every file of ours that has the expected arrays and shapes, without reading more of it
    channels        of the latents, None = any; `stride`: image pixels per latent, for the expected shape
    share           (rank, number of processes) of processes that fill the same cache: each has its own order and skips
                    what another has finished; all return all latents
    ranks           processes that fill the cache together: each encodes its share, and all return all latents

    After all other images, raises UserError with every image that could not be read or encoded; immediately for a
    file that cannot be written. Files written until then are kept and used by the next run.
    """
    entries, of_record = list_entries(records, source or (lambda index: _centred(placements[index])), flip, vae)
    encoder = Encoder(encode, encode_in_fp32)
    if not to_disk:
        prepare = partial(read_image, read=read)
        with ranks.failing_together():
            encoded = encode_all(entries, encoder, prepare, batch_size=batch_size, ranks=ranks, progress=progress)
            own = _by_number(encoded)
            encoder.raise_mistakes()
        return _all_in_memory(own, of_record, encoder, ranks)
    files = CacheFiles(suffix, cache_format, trust_third_party, skip_check, channels, stride, count_npz_names(entries))
    builder = _DiskBuilder(files, read, _look_up_all(files, entries, progress=progress))
    pending = builder.begin(entries, ranks)
    with ranks.failing_together():
        each = partial(encode_all, batch_size=batch_size, share=share, ranks=ranks, progress=progress)
        builder.write_all(each(pending, encoder, builder.prepare))
        encoder.raise_mistakes()
    return builder.result(entries, of_record, encoder, ranks)


def _centred(placement: Placement) -> LatentSource:
    return LatentSource(images.Geometry(placement.resized, images.centre_offset(placement), placement.bucket))


_ByNumber = dict[int, torch.Tensor]


def _by_number(encoded_images: Iterator[EncodedImage]) -> tuple[_ByNumber, _ByNumber, _ByNumber]:
    """Latents, those of mirror images, and masks, by the numbers of the entries. Images with a mistake
    (encoder.mistakes) are missing."""
    latents, flipped, latent_masks = _ByNumber(), _ByNumber(), _ByNumber()
    for image in encoded_images:
        number = image.entry.number
        latents[number] = image.latents
        if image.flipped is not None:
            flipped[number] = image.flipped
        if image.mask is not None:
            latent_masks[number] = _to_latent_size(image.mask, image.latents)
    return latents, flipped, latent_masks


def _all_in_memory(
    own: tuple[_ByNumber, _ByNumber, _ByNumber], of_record: Sequence[int], encoder: Encoder, ranks: Processes
) -> LatentCacheBuild:
    """The cache of all ranks, each of which encoded some entries."""
    latents, flipped, latent_masks = (ranks.merge(of_kind) for of_kind in own)
    store = MemoryLatents(
        tuple(latents[number] for number in of_record),
        tuple(flipped.get(number) for number in of_record) if flipped else (),
        tuple(latent_masks.get(number) for number in of_record) if latent_masks else (),
    )
    return LatentCacheBuild(store, 0, len(latents), 0, reencoded=ranks.total(len(encoder.reencoded)))


def _to_latent_size(mask: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Reduce a mask (H, W) to the size of its latents: (1, h, w)."""
    return masks.to_latent_size(mask, (latents.shape[-1], latents.shape[-2]))


def _look_up_all(files: CacheFiles, entries: Sequence[CacheEntry], *, progress: bool) -> list[Lookup]:
    lookups: list[Lookup] = []
    chunks = [entries[start : start + _CHUNK] for start in range(0, len(entries), _CHUNK)]
    with (
        ThreadPoolExecutor(THREADS) as pool,
        ProgressBar("checking cached latents", len(entries), shown=progress) as bar,
    ):
        for found in pool.map(lambda chunk: [files.find(entry) for entry in chunk], chunks):
            lookups += found
            bar.update(len(found))
    return lookups


@dataclass
class _DiskBuilder:
    """Writes the cache files of a run, while other processes may be writing them too."""

    files: CacheFiles
    read: Read
    lookups: list[Lookup]  # per entry, updated as entries are written or found
    encoded: int = 0
    outdated: int = 0

    def prepare(self, entry: CacheEntry) -> DecodedImage | None:
        """Decode the image of an entry; None if another process has written the entry meanwhile."""
        lookup = self.lookups[entry.number]
        if lookup.status == "missing" and os.path.exists(lookup.file):
            lookup = self.lookups[entry.number] = self.files.find(entry)
            if lookup.status in ("current", "third_party"):
                return None
        ready = read_image(entry, self.read)
        if lookup.status != "incomplete":
            return ready
        found = latent_files.read(lookup.file, {"latents"})
        key = Fingerprint(entry.settings, ready.image, ready.mask_hash, {}).key
        if found is None or found.fingerprint is None or found.fingerprint.key != key:
            return ready
        return replace(ready, kept=torch.from_numpy(found.arrays["latents"]))

    def write_all(self, encoded_images: Generator[EncodedImage, None, None]) -> None:
        """Write files in a thread, parallel to encoding. Raises UserError for a file that cannot be written."""
        writing: deque[Future[None]] = deque()
        with closing(encoded_images), ThreadPoolExecutor(1) as pool:
            for image in encoded_images:
                writing.append(pool.submit(self._write, image))
                while len(writing) > _WRITING:
                    writing.popleft().result()
            for future in writing:
                future.result()

    def begin(self, entries: Sequence[CacheEntry], ranks: Processes) -> list[CacheEntry]:
        """The entries to encode. Remove what killed processes left of their files."""
        pending = self._pending(entries)
        for folder in {entry.folder for entry in pending} if ranks.is_writer else ():
            remove_leftovers(folder)
        ranks.barrier()  # all have seen which files are missing
        return pending

    def _pending(self, entries: Sequence[CacheEntry]) -> list[CacheEntry]:
        return [entry for entry in entries if self.lookups[entry.number].status not in ("current", "third_party")]

    def result(
        self, entries: Sequence[CacheEntry], of_record: Sequence[int], encoder: Encoder, ranks: Processes
    ) -> LatentCacheBuild:
        """The cache when all entries are written, with the counts of all ranks."""
        for entry in self._pending(entries):  # written by another rank
            self.lookups[entry.number] = self.files.find(entry)
        encoded, outdated = ranks.total(self.encoded), ranks.total(self.outdated)
        reencoded = ranks.total(len(encoder.reencoded))
        store = DiskLatents(
            files=tuple(self.lookups[number].file for number in of_record),
            keys=tuple(self.lookups[number].key for number in of_record),
            masked=tuple(entries[number].masked for number in of_record),
        )
        third_party = sum(lookup.status == "third_party" for lookup in self.lookups)
        return LatentCacheBuild(store, len(entries) - encoded, encoded, outdated, third_party, reencoded)

    def _write(self, image: EncodedImage) -> None:
        entry = image.entry
        file = self.files.target(entry)
        arrays = _npz_arrays(image) if file.endswith(latent_files.NPZ_ENDING) else _own_arrays(image)
        try:
            if entry.content is not None:
                os.makedirs(entry.folder, exist_ok=True)
            fingerprint = latent_files.write(file, arrays, entry.settings, image.image, image.mask_hash)
        except OSError as error:
            raise _write_error(file, error) from error
        self.outdated += self.lookups[entry.number].status == "outdated"
        self.encoded += 1
        self.lookups[entry.number] = Lookup("current", file, fingerprint.key)


def _latents(image: EncodedImage) -> dict[str, Array]:
    arrays: dict[str, Array] = {"latents": image.latents.numpy()}
    if image.flipped is not None:
        arrays["latents_flipped"] = image.flipped.numpy()
    return arrays


def _own_arrays(image: EncodedImage) -> dict[str, Array]:
    mask = {} if image.mask is None else {"mask": _to_latent_size(image.mask, image.latents).numpy()}
    return {**_latents(image), **mask}


def _npz_arrays(image: EncodedImage) -> dict[str, Array]:
    """The arrays of sd-scripts; crop_ltrb is the actual crop."""
    (left, top), (width, height) = image.entry.geometry.offset, image.entry.geometry.bucket
    mask = {} if image.mask is None else {"alpha_mask": image.mask.numpy()}
    return {
        **_latents(image),
        "original_size": np.array(image.entry.size),
        "crop_ltrb": np.array([left, top, left + width, top + height]),
        **mask,
    }


def _mask_of(arrays: dict[str, Array], latents: torch.Tensor) -> torch.Tensor | None:
    """The mask (1, h, w) from the arrays of either format."""
    if "mask" in arrays:
        return torch.from_numpy(arrays["mask"])
    if "alpha_mask" in arrays:
        return _to_latent_size(torch.from_numpy(np.asarray(arrays["alpha_mask"], dtype=np.float32)), latents)
    return None


def _write_error(file: str, error: OSError) -> UserError:
    what = f"latent cache {file} cannot be written ({error.strerror or error})"
    remedy = "make the folder writable, or remove --cache_latents_to_disk"
    if error.errno in _FULL:
        remedy = "free disk space and start again, which continues from here; or remove --cache_latents_to_disk"
    return UserError([Mistake(what, remedy)])
