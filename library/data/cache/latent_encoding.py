"""Encode images with the VAE: decoded ahead in threads, encoded in batches of one bucket.

The posterior sample is keyed by the content of the image, not by the seed of the run, so that every run and every batch
gives the same latents. Independent of how latents are stored.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from library.data.cache.latent_entries import CacheEntry, hash_source
from library.data.cache.latent_files import FileHash, stamp
from library.data.cache.work_sharing import processing_order
from library.options.mistakes import Mistake, UserError
from library.runtime.processes import ALONE, Processes
from library.runtime.progress import ProgressBar
from library.runtime.seeds import torch_generator

# pixels (B, 3, H, W) float32 in [-1, 1], one generator per image -> latents (B, C, h, w), unscaled posterior samples
Encode = Callable[[torch.Tensor, list[torch.Generator]], torch.Tensor]
# index of a record -> pixels (3, H, W) float32 in [-1, 1] and, where it has one, its mask (H, W) float32 in [0, 1]
Read = Callable[[int], tuple[torch.Tensor, torch.Tensor | None]]

THREADS = max(4, min(16, os.cpu_count() or 4))
_ATTEMPTS = 3  # to read an image that another program is writing
_MOST_FAILURES = 16  # images without finite latents, if none has any: then the VAE is at fault


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image. `kept`: its latents (C, h, w), if only those of the mirror image are missing."""

    entry: CacheEntry
    image: FileHash
    mask_hash: FileHash | None
    pixels: torch.Tensor
    mask: torch.Tensor | None  # (H, W)
    kept: torch.Tensor | None = None


@dataclass(frozen=True)
class EncodedImage:
    """Latents (C, h, w) float32 of an image, of its mirror image if requested, and the files they were made from."""

    entry: CacheEntry
    image: FileHash
    mask_hash: FileHash | None
    mask: torch.Tensor | None  # (H, W)
    latents: torch.Tensor
    flipped: torch.Tensor | None


@dataclass
class Encoder:
    """Encodes images and collects a mistake for each image that fails."""

    encode: Encode
    encode_in_fp32: Encode | None = None  # in full precision, for latents that are not finite
    reencoded: set[int] = field(default_factory=set)  # numbers of the entries encoded in full precision
    mistakes: list[Mistake] = field(default_factory=list)
    _failed: int = 0
    _succeeded: int = 0

    def encode_batch(self, images: Sequence[DecodedImage]) -> Iterator[EncodedImage]:
        """Encode images of one bucket. Raises UserError if the encoder gives nothing but NaN."""
        latents_of = self._latents([ready for ready in images if ready.kept is None], mirrored=False)
        finite = [ready for ready in images if ready.kept is not None or latents_of.get(ready.entry.number) is not None]
        flipped = self._latents([ready for ready in finite if ready.entry.flip], mirrored=True)
        for ready in images:
            number = ready.entry.number
            latents, mirror = ready.kept if ready.kept is not None else latents_of[number], flipped.get(number)
            if latents is None or (ready.entry.flip and mirror is None):
                self._add_mistake(ready)
                continue
            self._succeeded += 1
            yield EncodedImage(ready.entry, ready.image, ready.mask_hash, ready.mask, latents, mirror)

    def _latents(self, images: Sequence[DecodedImage], *, mirrored: bool) -> dict[int, torch.Tensor | None]:
        """Latents of each entry, None if not finite."""
        if not images:
            return {}
        found: dict[int, torch.Tensor | None] = {}
        for ready, latents in zip(images, self._call(self.encode, images, mirrored=mirrored), strict=True):
            if not torch.isfinite(latents).all() and self.encode_in_fp32 is not None:
                self.reencoded.add(ready.entry.number)
                (latents,) = self._call(self.encode_in_fp32, [ready], mirrored=mirrored)
            # a view would keep the whole batch in memory
            found[ready.entry.number] = latents.clone() if torch.isfinite(latents).all() else None
        return found

    def _call(self, encode: Encode, images: Sequence[DecodedImage], *, mirrored: bool) -> torch.Tensor:
        pixels = torch.stack([ready.pixels for ready in images])
        purpose = "mirrored posterior" if mirrored else "posterior"
        generators = [torch_generator(purpose, ready.image.content) for ready in images]
        return encode(pixels.flip(-1) if mirrored else pixels, generators).detach().to("cpu", torch.float32)

    def raise_mistakes(self) -> None:
        """Raise UserError if any image could not be read or encoded."""
        if self.mistakes:
            raise UserError(self.mistakes)

    def _add_mistake(self, ready: DecodedImage) -> None:
        also = ", even in full precision" if self.encode_in_fp32 is not None else ""
        what = f"image {ready.entry.image}: the VAE gives latents that are not finite{also}"
        remedy = "remove the image, or use another --vae"
        if self.encode_in_fp32 is None:
            remedy = "encode in full precision (--no_half_vae), use another --vae, or remove the image"
        self.mistakes.append(Mistake(what, remedy))
        self._failed += 1
        if self._failed >= _MOST_FAILURES and not self._succeeded:
            raise UserError(self.mistakes)


def encode_all(
    entries: Sequence[CacheEntry],
    encoder: Encoder,
    prepare: Callable[[CacheEntry], DecodedImage | None],
    *,
    batch_size: int,
    share: tuple[int, int] = (0, 1),
    ranks: Processes = ALONE,
    progress: bool = True,
) -> Generator[EncodedImage, None, None]:
    """Encode all entries, or of several `ranks` the share of this one; those that fail are in `encoder.mistakes`.
    Images are decoded ahead in threads.

    `prepare` is called in a thread and returns None for an entry that another process has finished. `share`: see
    processing_order.
    """
    batches = ranks.own(_batches(entries, max(1, batch_size)))
    with ProgressBar("encoding latents", sum(map(len, batches)), shown=progress) as bar:
        for number, images in _decoded_ahead(processing_order(batches, share), prepare, encoder.mistakes):
            if images:
                yield from encoder.encode_batch(images)
            bar.update(number)


def _batches(entries: Sequence[CacheEntry], size: int) -> list[list[CacheEntry]]:
    by_bucket: dict[tuple[int, int], list[CacheEntry]] = {}
    for entry in entries:
        by_bucket.setdefault(entry.geometry.bucket, []).append(entry)
    return [
        by_bucket[bucket][start : start + size]
        for bucket in sorted(by_bucket)
        for start in range(0, len(by_bucket[bucket]), size)
    ]


def _decoded_ahead(
    batches: Sequence[Sequence[CacheEntry]],
    prepare: Callable[[CacheEntry], DecodedImage | None],
    mistakes: list[Mistake],
) -> Iterator[tuple[int, list[DecodedImage]]]:
    """The number of entries of each batch, and its decoded images that must be encoded."""
    waiting: deque[list[Future[DecodedImage | None]]] = deque()
    pool = ThreadPoolExecutor(THREADS)
    try:
        for batch in batches:
            waiting.append([pool.submit(prepare, entry) for entry in batch])
            # decode at least one image per thread while encoding
            if len(waiting) > 1 + THREADS // len(batch):
                first = waiting.popleft()
                yield len(first), _finished(first, mistakes)
        while waiting:
            first = waiting.popleft()
            yield len(first), _finished(first, mistakes)
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(futures: Sequence[Future[DecodedImage | None]], mistakes: list[Mistake]) -> list[DecodedImage]:
    found = []
    for future in futures:
        try:
            ready = future.result()
        except UserError as error:
            mistakes.extend(error.mistakes)
        else:
            found += [ready] if ready is not None else []
    return found


def read_image(entry: CacheEntry, read: Read) -> DecodedImage:
    """Read an image and its mask, with hashes of exactly those file contents.

    Raises UserError for a file that cannot be read or that keeps changing.
    """
    for attempt in range(_ATTEMPTS):
        before = _stamps(entry)
        image = _hash(entry.image, entry.content)
        mask_hash = _hash(entry.mask, entry.mask_content) if entry.mask is not None else None
        try:
            pixels, mask = read(entry.record)
        except UserError:
            if _stamps(entry) == before or attempt == _ATTEMPTS - 1:
                raise
            continue
        if _stamps(entry) == before:
            return DecodedImage(entry, image, mask_hash, pixels, mask)
    what = f"image {entry.image} changes while it is being read"
    raise UserError([Mistake(what, "start again when the program that writes it has finished")])


def _hash(path: str, content: str | None) -> FileHash:
    try:
        return hash_source(path, content)
    except OSError as error:
        raise UserError([_unreadable(path, error)]) from error


def _stamps(entry: CacheEntry) -> tuple[object, ...]:
    try:
        # members of shards are compared with their hashes as they are read
        files = ((entry.image, entry.content), (entry.mask, entry.mask_content))
        return tuple(stamp(path) for path, content in files if path is not None and content is None)
    except OSError as error:
        raise UserError([_unreadable(error.filename or entry.image, error)]) from error


def _unreadable(path: str, error: OSError) -> Mistake:
    return Mistake(f"image {path} cannot be read ({error})", "check the file and its permissions")
