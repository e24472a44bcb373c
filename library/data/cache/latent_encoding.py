"""Images through the VAE: decoded and scaled ahead in threads, encoded in batches of one bucket.

The posterior sample is keyed by the content of the image and not by the seed of the run, so that latents are the same
whoever makes them, in whatever batch. Nothing here knows files of latents.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from library.data.cache.latent_entries import Wanted
from library.data.cache.latent_files import FilePrint, stamp
from library.data.cache.work_sharing import own_order
from library.options.mistakes import Mistake, UserError
from library.runtime.seeds import torch_generator

# pixels (B, 3, H, W) float32 in [-1, 1], one generator per image -> latents (B, C, h, w), unscaled posterior samples
Encode = Callable[[torch.Tensor, list[torch.Generator]], torch.Tensor]
# index of a record -> pixels (3, H, W) float32 in [-1, 1] and, where it has one, its mask (H, W) float32 in [0, 1]
Read = Callable[[int], tuple[torch.Tensor, torch.Tensor | None]]

THREADS = max(4, min(16, os.cpu_count() or 4))
_ATTEMPTS = 3  # at reading an image that changes meanwhile
_BROKEN_ENCODER = 16  # images without finite latents, and none with: it is not the images


@dataclass(frozen=True)
class Ready:
    """An image decoded. `kept`: its latents (C, h, w), where only those of the mirror image are missing."""

    entry: Wanted
    image: FilePrint
    mask_print: FilePrint | None
    pixels: torch.Tensor
    mask: torch.Tensor | None  # (H, W)
    kept: torch.Tensor | None = None


@dataclass(frozen=True)
class Made:
    """Latents (C, h, w) float32 of an image, of its mirror image if wanted, and what they are of."""

    entry: Wanted
    image: FilePrint
    mask_print: FilePrint | None
    mask: torch.Tensor | None  # (H, W)
    latents: torch.Tensor
    flipped: torch.Tensor | None


@dataclass
class Encoder:
    """Encodes, and remembers what went wrong with which image; the others go on."""

    encode: Encode
    exactly: Encode | None = None  # the same in full precision, for what comes out not finite
    again: set[int] = field(default_factory=set)  # numbers of entries that needed it
    mistakes: list[Mistake] = field(default_factory=list)
    _broken: int = 0
    _made: int = 0

    def batch(self, images: Sequence[Ready]) -> Iterator[Made]:
        """What can be made of images of one bucket. Raises UserError when the encoder makes nothing but NaN."""
        plain = self._latents([ready for ready in images if ready.kept is None], mirrored=False)
        sound = [ready for ready in images if ready.kept is not None or plain.get(ready.entry.number) is not None]
        flipped = self._latents([ready for ready in sound if ready.entry.flip], mirrored=True)
        for ready in images:
            number = ready.entry.number
            latents, mirror = ready.kept if ready.kept is not None else plain[number], flipped.get(number)
            if latents is None or (ready.entry.flip and mirror is None):
                self._refuse(ready)
                continue
            self._made += 1
            yield Made(ready.entry, ready.image, ready.mask_print, ready.mask, latents, mirror)

    def _latents(self, images: Sequence[Ready], *, mirrored: bool) -> dict[int, torch.Tensor | None]:
        """Finite latents of each record, or None."""
        if not images:
            return {}
        found: dict[int, torch.Tensor | None] = {}
        for ready, latents in zip(images, self._call(self.encode, images, mirrored=mirrored), strict=True):
            if not torch.isfinite(latents).all() and self.exactly is not None:
                self.again.add(ready.entry.number)
                (latents,) = self._call(self.exactly, [ready], mirrored=mirrored)
            # a view would keep the whole batch alive
            found[ready.entry.number] = latents.clone() if torch.isfinite(latents).all() else None
        return found

    def _call(self, encode: Encode, images: Sequence[Ready], *, mirrored: bool) -> torch.Tensor:
        pixels = torch.stack([ready.pixels for ready in images])
        purpose = "mirrored posterior" if mirrored else "posterior"
        generators = [torch_generator(purpose, ready.image.content) for ready in images]
        return encode(pixels.flip(-1) if mirrored else pixels, generators).detach().to("cpu", torch.float32)

    def raise_mistakes(self) -> None:
        """Raise UserError for all that could not be read or encoded, if there is any."""
        if self.mistakes:
            raise UserError(self.mistakes)

    def _refuse(self, ready: Ready) -> None:
        exactly = ", in full precision too" if self.exactly is not None else ""
        what = f"image {ready.entry.image}: the VAE gives latents that are not finite{exactly}"
        remedy = "take the image out, or give another --vae"
        if self.exactly is None:
            remedy = "encode in full precision (--no_half_vae), give another --vae, or take the image out"
        self.mistakes.append(Mistake(what, remedy))
        self._broken += 1
        if self._broken >= _BROKEN_ENCODER and not self._made:
            raise UserError(self.mistakes)


def encode_all(
    entries: Sequence[Wanted],
    encoder: Encoder,
    prepare: Callable[[Wanted], Ready | None],
    *,
    batch_size: int,
    share: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> Generator[Made, None, None]:
    """What could be made of all entries; `encoder.mistakes` has the rest. Images are decoded ahead in threads.

    `prepare` runs in a thread; None: somebody else has done the entry. `share` (number, of how many processes): each
    has an order of its own.
    """
    batches = _batches(entries, max(1, batch_size))
    with tqdm(desc="encoding latents", total=len(entries), disable=not progress or not entries) as bar:
        for number, images in _decoded_ahead(own_order(batches, share), prepare, encoder.mistakes):
            if images:
                yield from encoder.batch(images)
            bar.update(number)


def _batches(entries: Sequence[Wanted], size: int) -> list[list[Wanted]]:
    by_bucket: dict[tuple[int, int], list[Wanted]] = {}
    for entry in entries:
        by_bucket.setdefault(entry.shown.bucket, []).append(entry)
    return [
        by_bucket[bucket][start : start + size]
        for bucket in sorted(by_bucket)
        for start in range(0, len(by_bucket[bucket]), size)
    ]


def _decoded_ahead(
    batches: Sequence[Sequence[Wanted]], prepare: Callable[[Wanted], Ready | None], mistakes: list[Mistake]
) -> Iterator[tuple[int, list[Ready]]]:
    """The number of entries of each batch, and those of its images that are left to encode."""
    waiting: deque[list[Future[Ready | None]]] = deque()
    pool = ThreadPoolExecutor(THREADS)
    try:
        for batch in batches:
            waiting.append([pool.submit(prepare, entry) for entry in batch])
            # at least one image per thread is on its way while the encoder works
            if len(waiting) > 1 + THREADS // len(batch):
                first = waiting.popleft()
                yield len(first), _finished(first, mistakes)
        while waiting:
            first = waiting.popleft()
            yield len(first), _finished(first, mistakes)
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(futures: Sequence[Future[Ready | None]], mistakes: list[Mistake]) -> list[Ready]:
    found = []
    for future in futures:
        try:
            ready = future.result()
        except UserError as error:
            mistakes.extend(error.mistakes)
        else:
            found += [ready] if ready is not None else []
    return found


def read_image(entry: Wanted, read: Read) -> Ready:
    """An image and its mask, and the prints of exactly the files that they were read from.

    Raises UserError for a file that cannot be read, or that goes on changing.
    """
    for attempt in range(_ATTEMPTS):
        before = _stamps(entry)
        image = take_print(entry.image)
        mask_print = take_print(entry.mask) if entry.mask is not None else None
        try:
            pixels, mask = read(entry.record)
        except UserError:
            if _stamps(entry) == before or attempt == _ATTEMPTS - 1:
                raise
            continue
        if _stamps(entry) == before:
            return Ready(entry, image, mask_print, pixels, mask)
    what = f"image {entry.image} changes while it is being read"
    raise UserError([Mistake(what, "start again when the other program has finished")])


def take_print(path: str, known: FilePrint | None = None) -> FilePrint:
    """The print of a file, by its stamp if `known` has it still. Raises UserError for one that cannot be read."""
    try:
        return FilePrint.take(path) if known is None else known.again(path)
    except OSError as error:
        raise UserError([_unreadable(path, error)]) from error


def _stamps(entry: Wanted) -> tuple[object, ...]:
    try:
        return tuple(stamp(path) for path in (entry.image, entry.mask) if path is not None)
    except OSError as error:
        raise UserError([_unreadable(error.filename or entry.image, error)]) from error


def _unreadable(path: str, error: OSError) -> Mistake:
    return Mistake(f"image {path} cannot be read ({error})", "check the file")
