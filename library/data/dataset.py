"""From a request to a batch, and the loader that keeps worker processes busy with requests.

The dataset has no state: a request holds all that differs from sample to sample, and every draw is keyed by (seed,
purpose, epoch, image, repeat). So a batch is the same whichever worker makes it, and workers that outlive an epoch
need no word about the next one.
"""

from __future__ import annotations

import atexit
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from library.data import captions, images, masks
from library.data.batch import Batch, Tokenize
from library.data.cache.latent_cache import LatentStore
from library.data.images import Geometry
from library.data.order import BatchRequest
from library.data.reading import ImageReader
from library.options.datasets import Size
from library.options.groups.dataset import CropConditioning
from library.options.mistakes import Mistake, UserError
from library.runtime.seeds import python_random


@dataclass(frozen=True)
class TrainingDataset(Dataset[Batch]):
    """Makes the batch of a request. Picklable, so that workers can be started by spawn.

    `steps` is the length of the run in optimiser steps, `stride` the pixels of a latent, `missing_mask` what stands in
    the mask of an image that has none, `score` that of images without one of their own.
    """

    images: ImageReader
    tokenize: Tokenize
    seed: int
    steps: int
    stride: int = 8
    missing_mask: float = 1.0
    prior_loss_weight: float = 1.0
    latents: LatentStore | None = None  # None: batches hold pixels
    crop_conditioning: CropConditioning = "exact"
    score: float = 7.0

    def __post_init__(self) -> None:
        if self.latents is None:
            return
        one_of_each = {(record.subset, record.dataset): index for index, record in enumerate(self.images.records)}
        varied = map(self.images.settings, one_of_each.values())
        if any(each.random_crop or each.colour or each.face_crop for each in varied):
            raise ValueError("random crops and colours have no effect on cached latents")

    def __getitem__(self, request: BatchRequest) -> Batch:
        """Raises UserError for an image, mask or latent cache that cannot be read."""
        records = [self.images.records[index] for index, _ in request.samples]
        texts = tuple(self.caption(request.epoch, request.step, *sample) for sample in request.samples)
        shown = [self.geometry(request.epoch, *sample) for sample in request.samples]
        read = [self._image(request.epoch, *sample, part) for sample, part in zip(request.samples, shown, strict=True)]
        stacked = torch.stack([image for image, _ in read])
        sizes, score = self.sizes_and_scores([index for index, _ in request.samples], shown)
        return Batch(
            pixels=stacked if self.latents is None else None,
            latents=None if self.latents is None else stacked,
            mask=self._masks([mask for _, mask in read], request.bucket) if self.images.has_masks else None,
            text_inputs=self.tokenize(texts),
            sizes=sizes,
            score=score,
            weights=torch.tensor([self.prior_loss_weight if record.is_reg else 1.0 for record in records]),
            sample_index=torch.arange(request.first_sample, request.first_sample + len(records)),
            paths=tuple(str(record.path) for record in records),
            captions=texts,
        )

    def caption(self, epoch: int, step: int, index: int, repeat: int) -> str:
        """The text that this sample is trained with."""
        record = self.images.records[index]
        rng = python_random(self.seed, "caption", epoch, record.key, repeat)
        chosen = self.images.subsets[record.subset].captions
        return captions.process(record.caption, chosen, rng, epoch, step, self.steps)

    def texts(self, requests: Iterable[BatchRequest]) -> Iterator[str]:
        """The text of every sample of these requests, without reading an image."""
        for request in requests:
            for sample in request.samples:
                yield self.caption(request.epoch, request.step, *sample)

    def geometry(self, epoch: int, index: int, repeat: int) -> Geometry:
        """What this sample shows of its image."""
        key = self.images.records[index].key
        # a stream for each purpose: switching one augmentation on leaves the draws of the others alone
        crop, flip = (python_random(self.seed, purpose, epoch, key, repeat) for purpose in ("crop", "flip"))
        return self.images.geometry(index, crop, flip)

    def sizes_and_scores(
        self, indices: Sequence[int], shown: Sequence[Geometry | None] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a model is told of records, (B, 6) and (B,) float32: see Batch. `shown`: what samples show of them,
        without it what a cache holds."""
        parts = shown or [None] * len(indices)
        sizes = [
            self.images.sizes(index, self.crop_conditioning, part) for index, part in zip(indices, parts, strict=True)
        ]
        scores = [self.images.score(index, self.score) for index in indices]
        return torch.tensor(sizes, dtype=torch.float32), torch.tensor(scores, dtype=torch.float32)

    def _image(self, epoch: int, index: int, repeat: int, shown: Geometry) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.latents is not None:
            found = self.latents.get(index, shown.flipped)
            return found.latents, found.mask
        pixels, mask = self.images.pixels(index, shown), self.images.mask(index, shown)
        if self.images.settings(index).colour:
            key = self.images.records[index].key
            pixels = images.vary_colour(pixels, python_random(self.seed, "colour", epoch, key, repeat))
        reduced = None
        if mask is not None:
            size = (shown.bucket[0] // self.stride, shown.bucket[1] // self.stride)
            reduced = masks.to_latent_size(torch.from_numpy(masks.to_float(mask)), size)
        return torch.from_numpy(images.to_float(pixels)), reduced

    def _masks(self, found: Sequence[torch.Tensor | None], bucket: Size) -> torch.Tensor:
        missing = torch.full((1, bucket[1] // self.stride, bucket[0] // self.stride), self.missing_mask)
        return torch.stack([missing if mask is None else mask for mask in found])


class BatchLoader:
    """Batches made in a thread (workers=0) or by worker processes, ahead and in the order of the requests.

    Workers are started by spawn on every system and live as long as there are requests: from one epoch to the next.
    Latents in memory would be copied into each worker: use workers=0 with them.
    """

    def __init__(self, dataset: TrainingDataset, *, workers: int = 0, pin_memory: bool = False) -> None:
        self._dataset = dataset
        self._requests = _Requests()
        self._running: Iterator[Batch | _Failed] | None = None
        self._loader: DataLoader[Batch | _Failed] = DataLoader(
            _Guarded(dataset),
            sampler=self._requests,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=workers,
            multiprocessing_context="spawn" if workers > 0 else None,
            worker_init_fn=_prepare_worker if workers > 0 else None,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else each iteration draws from torch's global generator
        )

    def batches(self, requests: Iterable[BatchRequest]) -> Iterator[tuple[BatchRequest, Batch]]:
        """Each request with its batch, in order; requests are drawn as workers come free. One iteration at a time.

        Raises UserError for what a request raises, and when a worker process dies.
        """
        if not self._loader.num_workers:
            yield from self._in_a_thread(requests)
            return
        self._requests.start(requests)
        with explain_dead_workers():
            batches = self._running = iter(self._loader)
        while True:
            try:
                with explain_dead_workers():
                    batch = next(batches, None)
            except (OSError, EOFError) as error:
                # the pipe to a dead worker; what a living one raises comes with "Caught ..." before it
                if str(error).startswith("Caught"):
                    raise
                raise _dead_worker(error) from None
            if batch is None:
                return
            if isinstance(batch, _Failed):
                raise UserError(batch.mistakes)
            yield self._requests.next_done(), batch

    def _in_a_thread(self, requests: Iterable[BatchRequest]) -> Iterator[tuple[BatchRequest, Batch]]:
        """Two batches ahead. Reading, decoding and tokenizing let the training go on meanwhile."""
        ahead: deque[tuple[BatchRequest, Future[Batch]]] = deque()
        with ThreadPoolExecutor(1, "batches") as thread:
            try:
                for request in requests:
                    ahead.append((request, thread.submit(self._make, request)))
                    if len(ahead) > 2:
                        first, made = ahead.popleft()
                        yield first, made.result()
                for first, made in ahead:
                    yield first, made.result()
            finally:
                thread.shutdown(cancel_futures=True)

    def _make(self, request: BatchRequest) -> Batch:
        batch = self._dataset[request]
        return batch.pin_memory() if self._loader.pin_memory else batch

    def close(self) -> None:
        """End the worker processes now.

        Left to garbage collection, torch goes on watching them, and the end of one raises wherever the program then is.
        """
        end = getattr(self._running, "_shutdown_workers", None)
        self._running = None
        if end is None:
            return
        try:
            end()
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):  # one that crashes while it ends has done its work
                raise


@contextmanager
def explain_dead_workers() -> Iterator[None]:
    """Turn torch's RuntimeError for a dead worker into a UserError.

    BatchLoader does it for its own part. torch raises from a signal handler too, wherever the main thread happens to
    be, so a loop that uses workers stands inside this as a whole.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise _dead_worker(error) from None


def _dead_worker(error: Exception) -> UserError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    what = f"a process that prepares images died ({reason})"
    remedy = "often memory or shared memory ran out: lower --max_data_loader_n_workers, or set it to 0"
    return UserError([Mistake(what, remedy)])


@dataclass(frozen=True)
class _Failed:
    """A UserError on its way from a worker: raised there, torch would wrap it in a traceback."""

    mistakes: tuple[Mistake, ...]


@dataclass(frozen=True)
class _Guarded(Dataset["Batch | _Failed"]):
    dataset: TrainingDataset

    def __getitem__(self, request: BatchRequest) -> Batch | _Failed:
        try:
            return self.dataset[request]
        except UserError as error:
            return _Failed(error.mistakes)


class _Requests:
    """The sampler: what to make next is decided in the main process and sent to the workers."""

    def __init__(self) -> None:
        self._coming: Iterable[BatchRequest] = ()
        self._sent: deque[BatchRequest] = deque()

    def start(self, requests: Iterable[BatchRequest]) -> None:
        """What the next iteration goes through."""
        self._coming = requests
        self._sent.clear()

    def __iter__(self) -> Iterator[BatchRequest]:
        for request in self._coming:
            self._sent.append(request)
            yield request

    def next_done(self) -> BatchRequest:
        """The oldest request that was sent and not asked for here: batches come in the order of their requests."""
        return self._sent.popleft()


def _unchanged(batch: Any) -> Any:
    return batch


def _prepare_worker(_: int) -> None:
    import cv2

    cv2.setNumThreads(1)  # there are as many workers as the user wants cores to work
    # Native libraries that still have threads may abort while they are unloaded, which torch would report as a dead
    # worker. Python has finished by then: leave without unloading.
    atexit.register(os._exit, 0)
