"""Latents encoded once before training, in memory or in a file beside each picture.

A file has the name and arrays of kohya's sd-scripts, and one array more: a fingerprint of all that
the latents depend on. A file without it, or with another, is made anew. The posterior sample is keyed by the content of
the picture and not by the seed of the run, so that a cache is the same whoever makes it.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from library.data import images
from library.data.buckets import Placement
from library.data.scan import ImageRecord
from library.options.mistakes import Mistake, UserError
from library.runtime.seeds import torch_generator

# pixels (B, 3, H, W) float32 in [-1, 1], one generator per picture -> latents (B, C, h, w), unscaled posterior samples
Encode = Callable[[torch.Tensor, list[torch.Generator]], torch.Tensor]

FINGERPRINT = "dreamfolder_fingerprint"
_VERSION = 1  # raise it when pixels or latents of the same picture come out differently
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
_THREADS = 4


@dataclass(frozen=True)
class MemoryLatents:
    """Latents (C, h, w) float32 per record; `flipped` is empty without flip augmentation."""

    latents: tuple[torch.Tensor, ...]
    flipped: tuple[torch.Tensor, ...] = ()

    def get(self, record: int, flipped: bool) -> torch.Tensor:
        """Latents of a record, or of its mirror image."""
        return self.flipped[record] if flipped else self.latents[record]


@dataclass(frozen=True)
class DiskLatents:
    """Files and fingerprints per record; nothing is held in memory."""

    files: tuple[Path, ...]
    fingerprints: tuple[str, ...]

    def get(self, record: int, flipped: bool) -> torch.Tensor:
        """As MemoryLatents.get. Raises UserError if the file is gone or was made anew for something else meanwhile."""
        latents = _read(self.files[record], self.fingerprints[record], flipped)
        if latents is None:
            what = f"latent cache {self.files[record]} was removed or changed by another program during the run"
            raise UserError([Mistake(what, "start again, with one run at a time on this folder")])
        return torch.from_numpy(latents)


LatentStore = MemoryLatents | DiskLatents


@dataclass(frozen=True)
class Filled:
    """The latents of all records, and where they come from: counts of pictures."""

    store: LatentStore
    read: int  # from files that were up to date
    made: int
    stale: int  # of those made: a file was there and did not fit

    def __str__(self) -> str:
        text = f"latents: {self.read} read, {self.made} made"
        return f"{text} ({self.stale} of them in place of an outdated cache file)" if self.stale else text


def cache_files(records: Sequence[ImageRecord], suffix: str) -> tuple[Path, ...]:
    """The cache file of each record: stem, original size, suffix of the family, beside the picture.

    Where two pictures of a folder have the same stem and size (a.png, a.jpg) their names keep the ending:
    a.png_0512x0512_sd.npz. Names are compared without case, as some file systems do.
    """
    spots = [(record.path.parent, record.path.stem.casefold(), record.size) for record in records]
    shared = Counter(spots)
    files: dict[int, Path] = {}
    taken: set[tuple[Path, str]] = set()
    for index in sorted(range(len(records)), key=lambda index: shared[spots[index]] > 1):
        path, (width, height) = records[index].path, records[index].size
        base = path.name if shared[spots[index]] > 1 else path.stem
        while (path.parent, name := f"{base}_{width:04d}x{height:04d}{suffix}".casefold()) in taken:
            base += "_"
        taken.add((path.parent, name))
        files[index] = path.with_name(f"{base}_{width:04d}x{height:04d}{suffix}")
    return tuple(files[index] for index in range(len(records)))


def fill(
    records: Sequence[ImageRecord],
    placements: Sequence[Placement],
    encode: Encode,
    *,
    vae: str,
    suffix: str,
    to_disk: bool,
    flip: bool,
    batch_size: int = 1,
    progress: bool = True,
) -> Filled:
    """Make the latents of all records available, encoding what is not in an up-to-date file.

    `vae` names the weights and precision of the VAE (two runs whose latents differ must give different names); `suffix`
    is the family's file ending. Centre crops only. With `flip` the mirror images are encoded too.
    Raises UserError for a picture that cannot be read, latents that are not finite, or a file that cannot be written.
    """
    contents = _hash_all([record.path for record in records], progress)
    job = _Job(records, placements, contents, encode, flip)
    if not to_disk:
        made = dict(_encode_all(job, range(len(records)), batch_size, progress))
        plain, mirrored = zip(*(made[index] for index in range(len(records))), strict=True) if made else ((), ())
        return Filled(MemoryLatents(plain, mirrored if flip else ()), 0, len(records), 0)
    files = cache_files(records, suffix)
    prints = tuple(_fingerprint(content, place, vae) for content, place in zip(contents, placements, strict=True))
    pending = [index for index in range(len(records)) if not _is_current(files[index], prints[index], flip)]
    stale = sum(files[index].exists() for index in pending)
    for index, (latents, flipped) in _encode_all(job, pending, batch_size, progress):
        left, top = images.centre_offset(placements[index])
        width, height = placements[index].bucket
        arrays = {
            "latents": latents.numpy(),
            "original_size": np.array(records[index].size),
            "crop_ltrb": np.array([left, top, left + width, top + height]),
            FINGERPRINT: np.array(prints[index]),
        }
        if flipped is not None:
            arrays["latents_flipped"] = flipped.numpy()
        _write(files[index], arrays)
    return Filled(DiskLatents(files, prints), len(records) - len(pending), len(pending), stale)


@dataclass(frozen=True)
class _Job:
    records: Sequence[ImageRecord]
    placements: Sequence[Placement]
    contents: Sequence[str]
    encode: Encode
    flip: bool

    def pixels(self, index: int) -> torch.Tensor:
        placement = self.placements[index]
        picture = images.load(self.records[index].path, self.records[index].size)
        return torch.from_numpy(images.to_float(images.fit(picture, placement, images.centre_offset(placement))))


def _hash_all(paths: Sequence[Path], progress: bool) -> list[str]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(tqdm(pool.map(_hash, paths), "reading pictures", len(paths), disable=not progress))


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
    except OSError as error:
        raise UserError([Mistake(f"picture {path} cannot be read ({error})", "check the file")]) from error


def _fingerprint(content: str, placement: Placement, vae: str) -> str:
    """All that the latents depend on. Flipped latents are an array of their own, so flip_aug is not part of it."""
    parts = (_VERSION, content, placement.bucket, placement.resized, images.centre_offset(placement), vae)
    return hashlib.blake2b(repr(parts).encode(), digest_size=32).hexdigest()


def _encode_all(
    job: _Job, indexes: Sequence[int], batch_size: int, progress: bool
) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor | None]]]:
    """(record index, (latents, mirrored latents)) in batches of one bucket; pictures are decoded ahead in threads."""
    by_bucket: dict[tuple[int, int], list[int]] = {}
    for index in indexes:
        by_bucket.setdefault(job.placements[index].bucket, []).append(index)
    batches = [
        by_bucket[bucket][start : start + max(1, batch_size)]
        for bucket in sorted(by_bucket)
        for start in range(0, len(by_bucket[bucket]), max(1, batch_size))
    ]
    with tqdm(desc="encoding latents", total=len(indexes), disable=not progress or not indexes) as bar:
        for batch, pixels in _decode_ahead(job, batches):
            latents = _encode_batch(job, batch, pixels, "posterior")
            flipped = _encode_batch(job, batch, pixels.flip(-1), "mirrored posterior") if job.flip else None
            for place, index in enumerate(batch):
                yield index, (latents[place], None if flipped is None else flipped[place])
            bar.update(len(batch))


def _decode_ahead(job: _Job, batches: list[list[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
    waiting: deque[tuple[list[int], list[Future[torch.Tensor]]]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for batch in batches:
            waiting.append((batch, [pool.submit(job.pixels, index) for index in batch]))
            # at least one picture per thread is on its way while the encoder works
            if len(waiting) > 1 + _THREADS // len(batch):
                first, futures = waiting.popleft()
                yield first, torch.stack([future.result() for future in futures])
        for first, futures in waiting:
            yield first, torch.stack([future.result() for future in futures])


def _encode_batch(job: _Job, batch: list[int], pixels: torch.Tensor, purpose: str) -> list[torch.Tensor]:
    generators = [torch_generator(purpose, job.contents[index]) for index in batch]
    latents = job.encode(pixels, generators).detach().to("cpu", torch.float32)
    for index, one in zip(batch, latents, strict=True):
        if not torch.isfinite(one).all():
            what = f"picture {job.records[index].path}: the VAE gives latents that are not finite"
            remedy = "encode in full precision (--no_half_vae), give another --vae, or take the picture out"
            raise UserError([Mistake(what, remedy)])
    return [one.clone() for one in latents]  # a view would keep the whole batch alive


def _is_current(file: Path, fingerprint: str, flip: bool) -> bool:
    if not file.exists():
        return False
    return all(_read(file, fingerprint, flipped) is not None for flipped in ([False, True] if flip else [False]))


def _read(file: Path, fingerprint: str, flipped: bool) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """Latents of a file, None if it is missing, damaged, or of another fingerprint."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if str(arrays[FINGERPRINT]) != fingerprint:
                return None
            latents = arrays["latents_flipped" if flipped else "latents"]
            return np.asarray(latents, dtype=np.float32)
    except _UNREADABLE:
        return None


def _write(file: Path, arrays: dict[str, Any]) -> None:
    """Whole or not at all: a temporary file beside it takes its name when it is complete."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as target:
            np.savez(target, **arrays)
        os.replace(temporary, file)
    except OSError as error:
        what = f"latent cache {file} cannot be written ({error})"
        remedy = "free the disk, make the folder writable, or use --cache_latents without --cache_latents_to_disk"
        raise UserError([Mistake(what, remedy)]) from error
    finally:
        temporary.unlink(missing_ok=True)
