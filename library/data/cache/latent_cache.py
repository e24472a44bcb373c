"""Latents encoded once before training, in memory or in a file beside each image.

A cached entry is found by what it is of: the bytes of the image and of its mask, how they are scaled and cut, what
transparency is laid on, and the VAE. So nothing that is out of date is ever used, and what has not changed is not made
again. Files beside the images need no lock and no index: each is whole, verifies itself (latent_files.py),
moves along with its image, and a run that ends early loses only what it was working on. An image is read only when
its stamp is not the one in its entry; looking at the entries of 100,000 images reads those, and no image.
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
from tqdm import tqdm

from library.data import images, masks
from library.data.buckets import Placement
from library.data.cache import latent_files
from library.data.cache.latent_encoding import THREADS, Encode, Encoder, Made, Read, Ready, encode_all, read_image
from library.data.cache.latent_entries import (
    CacheFormat,
    Files,
    LatentSource,
    Look,
    Wanted,
    key_of,
    names_wanted,
    wanted_by,
)
from library.data.cache.latent_files import Array, Note
from library.data.scan.scan import ImageRecord
from library.options.mistakes import Mistake, UserError

_CHUNK = 256  # entries that a thread looks at in a row
_WRITING = 8  # files that may wait to be written
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_MASKS = ("mask", "alpha_mask")  # at latent size in our files, in pixels in an .npz


class Encoded(NamedTuple):
    """What is cached of an image: latents (C, h, w) float32, mask (1, h, w) float32 in [0, 1] or None."""

    latents: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True)
class MemoryLatents:
    """Latents (C, h, w) float32 per record; `flipped` and `masks` are empty where no record has any."""

    latents: tuple[torch.Tensor, ...]
    flipped: tuple[torch.Tensor | None, ...] = ()
    masks: tuple[torch.Tensor | None, ...] = ()

    def get(self, record: int, flipped: bool) -> Encoded:  # noqa: FBT001 - the key of a sample
        """Latents and mask of a record, or of its mirror image."""
        latents = self.flipped[record] if flipped else self.latents[record]
        if latents is None:
            raise ValueError(f"record {record} was cached without its mirror image")
        mask = self.masks[record] if self.masks else None
        return Encoded(latents, mask.flip(-1) if mask is not None and flipped else mask)


@dataclass(frozen=True)
class DiskLatents:
    """Per record its file, the key of what it must hold, and whether it has a mask; nothing is held in memory."""

    files: tuple[str, ...]
    keys: tuple[str, ...]
    masked: tuple[bool, ...]

    def get(self, record: int, flipped: bool) -> Encoded:  # noqa: FBT001 - the key of a sample
        """As MemoryLatents.get. Raises UserError if the file is gone, damaged, or of something else meanwhile."""
        name = "latents_flipped" if flipped else "latents"
        file = self.files[record]
        entry = latent_files.read(file, {name, *_MASKS} if self.masked[record] else {name})
        if entry is None or name not in entry.arrays or key_of(file, entry.note) != self.keys[record]:
            what = f"latent cache {file} was removed, damaged or changed by another program during the run"
            raise UserError([Mistake(what, "start again, and leave the cache as it is during a run")])
        latents = torch.from_numpy(np.asarray(entry.arrays[name], dtype=np.float32))
        mask = _mask_of(entry.arrays, latents)
        return Encoded(latents, mask.flip(-1) if mask is not None and flipped else mask)


LatentStore = MemoryLatents | DiskLatents


@dataclass(frozen=True)
class LatentCacheBuild:
    """The latents of all records, and where they come from: counts of entries (equal records share one)."""

    store: LatentStore
    read: int  # from files that were up to date
    made: int
    stale: int  # of those made: a file was there and did not fit
    foreign: int = 0  # of those read: files of another program, in which nothing tells of which image and VAE
    exactly: int = 0  # of those made: encoded again in full precision, because the latents were not finite

    def __str__(self) -> str:
        text = f"latents: {self.read} read, {self.made} made"
        text += f" ({self.stale} of them anew: outdated, damaged or unfit cache files)" if self.stale else ""
        text += f"; {self.exactly} encoded again in full precision" if self.exactly else ""
        if self.foreign:
            text += f"; {self.foreign} read from another program's .npz, which cannot tell its VAE: delete to be sure"
        return text


def build_latent_cache(  # noqa: PLR0913 - one call in the program; each changes alone in a test
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
    trust_foreign: bool = True,
    skip_check: bool = False,
    channels: int | None = None,
    stride: int = 8,
    share: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> LatentCacheBuild:
    """Make the latents of all records available, encoding what is not in an up-to-date file.

    read            pixels and mask of a record as `source` says, not mirrored; called in threads
    vae             names weights and precision of the VAE: two that give other latents need other names
    suffix          the family's file ending, as sd-scripts has it: _sd.npz
    flip            per record, whether its mirror image is wanted too; a file that lacks only that is completed
    source          per record; default: the centre of its placement, without a mask
    encode_in_fp32  `encode` in full precision, for images whose latents come out not finite
    trust_foreign   use an .npz of another program if its shape, original size and arrays are those wanted, its latents
                    finite, it is no older than the image, and the program would have prepared the image as
                    `source` says: centre crop, scaled by need, opaque or masked by its transparency. Nothing in it
                    tells of which VAE it is.
    skip_check      take every file of ours whose arrays are there and have the right shape, reading no more of it
    channels        of the latents, None = any; `stride`: pixels a latent, to tell the shape that a file must have
    share           (number, of how many processes) that fill the same files at once: each has an order of its own and
                    passes over what another has done meanwhile. All of them end with all latents.

    Raises UserError with all images that could not be read or encoded, when the others are done; at once for a file
    that cannot be written. What is on disk by then stays and is used the next time.
    """
    entries, of_record = wanted_by(records, source or (lambda index: _centred(placements[index])), flip, vae)
    encoder = Encoder(encode, encode_in_fp32)
    if not to_disk:
        prepare = partial(read_image, read=read)
        all_made = encode_all(entries, encoder, prepare, batch_size=batch_size, progress=progress)
        in_memory = _in_memory(all_made, of_record)
        encoder.raise_mistakes()
        return LatentCacheBuild(in_memory, 0, len(entries), 0, exactly=len(encoder.again))
    files = Files(suffix, cache_format, trust_foreign, skip_check, channels, stride, names_wanted(entries))
    work = _DiskWork(files, read, _look_at_all(files, entries, progress=progress))
    pending = [entry for entry in entries if work.looks[entry.number].verdict not in ("current", "foreign")]
    for folder in {entry.folder for entry in pending}:
        latent_files.sweep(folder)
    work.write_all(encode_all(pending, encoder, work.prepare, batch_size=batch_size, share=share, progress=progress))
    encoder.raise_mistakes()
    return work.filled(entries, of_record, len(encoder.again))


def _centred(placement: Placement) -> LatentSource:
    return LatentSource(images.Geometry(placement.resized, images.centre_offset(placement), placement.bucket))


def _in_memory(all_made: Iterator[Made], of_record: Sequence[int]) -> MemoryLatents:
    """What was made; of what was not (the encoder tells) the store is incomplete."""
    latents: dict[int, torch.Tensor] = {}
    flipped: dict[int, torch.Tensor] = {}
    reduced: dict[int, torch.Tensor] = {}
    for made in all_made:
        number = made.entry.number
        latents[number] = made.latents
        if made.flipped is not None:
            flipped[number] = made.flipped
        if made.mask is not None:
            reduced[number] = _reduced(made.mask, made.latents)
    return MemoryLatents(
        tuple(latents[number] for number in of_record if number in latents),
        tuple(flipped.get(number) for number in of_record) if flipped else (),
        tuple(reduced.get(number) for number in of_record) if reduced else (),
    )


def _reduced(mask: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """A mask (H, W) in pixels, at the size of its latents: (1, h, w)."""
    return masks.to_latent_size(mask, (latents.shape[-1], latents.shape[-2]))


def _look_at_all(files: Files, entries: Sequence[Wanted], *, progress: bool) -> list[Look]:
    looks: list[Look] = []
    chunks = [entries[start : start + _CHUNK] for start in range(0, len(entries), _CHUNK)]
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(desc="checking cached latents", total=len(entries), disable=not progress) as bar,
    ):
        for found in pool.map(lambda chunk: [files.look(entry) for entry in chunk], chunks):
            looks += found
            bar.update(len(found))
    return looks


@dataclass
class _DiskWork:
    """Files made while others may be making them too."""

    files: Files
    read: Read
    looks: list[Look]  # per entry; what is made or found meanwhile is noted here
    made: int = 0
    stale: int = 0

    def prepare(self, entry: Wanted) -> Ready | None:
        """Decode the image of an entry; None when another process has made the entry since it was looked for."""
        look = self.looks[entry.number]
        if look.verdict == "missing" and os.path.exists(look.file):
            look = self.looks[entry.number] = self.files.look(entry)
            if look.verdict in ("current", "foreign"):
                return None
        ready = read_image(entry, self.read)
        if look.verdict != "half":
            return ready
        found = latent_files.read(look.file, {"latents"})
        key = Note(entry.settings, ready.image, ready.mask_print, {}).key
        if found is None or found.note is None or found.note.key != key:
            return ready
        return replace(ready, kept=torch.from_numpy(found.arrays["latents"]))

    def write_all(self, all_made: Generator[Made, None, None]) -> None:
        """Write in a thread, so that the encoder need not wait. Raises UserError for a file that cannot be written."""
        writing: deque[Future[None]] = deque()
        with closing(all_made), ThreadPoolExecutor(1) as pool:
            for made in all_made:
                writing.append(pool.submit(self._write, made))
                while len(writing) > _WRITING:
                    writing.popleft().result()
            for future in writing:
                future.result()

    def filled(self, entries: Sequence[Wanted], of_record: Sequence[int], exactly: int) -> LatentCacheBuild:
        """What there is now, when all is there."""
        store = DiskLatents(
            files=tuple(self.looks[number].file for number in of_record),
            keys=tuple(self.looks[number].key for number in of_record),
            masked=tuple(entries[number].masked for number in of_record),
        )
        foreign = sum(look.verdict == "foreign" for look in self.looks)
        return LatentCacheBuild(store, len(entries) - self.made, self.made, self.stale, foreign, exactly)

    def _write(self, made: Made) -> None:
        entry = made.entry
        file = self.files.target(entry)
        arrays = _npz_arrays(made) if file.endswith(latent_files.NPZ_ENDING) else _own_arrays(made)
        try:
            note = latent_files.write(file, arrays, entry.settings, made.image, made.mask_print)
        except OSError as error:
            raise _unwritable(file, error) from error
        self.stale += self.looks[entry.number].verdict == "stale"
        self.made += 1
        self.looks[entry.number] = Look("current", file, note.key)


def _latents(made: Made) -> dict[str, Array]:
    arrays: dict[str, Array] = {"latents": made.latents.numpy()}
    if made.flipped is not None:
        arrays["latents_flipped"] = made.flipped.numpy()
    return arrays


def _own_arrays(made: Made) -> dict[str, Array]:
    mask = {} if made.mask is None else {"mask": _reduced(made.mask, made.latents).numpy()}
    return {**_latents(made), **mask}


def _npz_arrays(made: Made) -> dict[str, Array]:
    """As sd-scripts names them; but crop_ltrb is the crop that was made."""
    (left, top), (width, height) = made.entry.shown.offset, made.entry.shown.bucket
    mask = {} if made.mask is None else {"alpha_mask": made.mask.numpy()}
    return {
        **_latents(made),
        "original_size": np.array(made.entry.size),
        "crop_ltrb": np.array([left, top, left + width, top + height]),
        **mask,
    }


def _mask_of(arrays: dict[str, Array], latents: torch.Tensor) -> torch.Tensor | None:
    """The mask (1, h, w) of a file's arrays, whichever format it has."""
    if "mask" in arrays:
        return torch.from_numpy(arrays["mask"])
    if "alpha_mask" in arrays:
        return _reduced(torch.from_numpy(np.asarray(arrays["alpha_mask"], dtype=np.float32)), latents)
    return None


def _unwritable(file: str, error: OSError) -> UserError:
    what = f"latent cache {file} cannot be written ({error.strerror or error})"
    remedy = "make the folder writable, or use --cache_latents without --cache_latents_to_disk"
    if error.errno in _FULL:
        remedy = "free some of the disk and start again, which goes on from here, or leave out --cache_latents_to_disk"
    return UserError([Mistake(what, remedy)])
