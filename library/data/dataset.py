"""The dataset, which builds the batch of a request, and the loader, which sends requests to worker processes.

The dataset is stateless: a request contains everything that varies, and every draw is keyed by (seed, purpose, epoch,
image, repeat). So a batch does not depend on the worker that builds it, and workers live on from epoch to epoch without
further communication.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from library.data import captions, images, masks, retries
from library.data.batch import Batch, Tokenize, Unread
from library.data.cache.latent_cache import LatentStore
from library.data.images import Geometry
from library.data.order import BatchRequest
from library.data.reading import ImageReader
from library.data.retries import Unreadable
from library.data.scan.image_record import ImageRecord
from library.options.datasets import Size
from library.options.groups.dataset import CropConditioning
from library.options.mistakes import Mistake, UserError
from library.runtime.children import end_with_parent
from library.runtime.seeds import python_random
from library.runtime.signals import starting_processes

ImageAndMask = tuple[torch.Tensor, torch.Tensor | None]
"""Pixels or latents of a sample, and its mask at latent size."""


@dataclass(frozen=True)
class TrainingDataset(Dataset[Batch]):
    """Builds the batch of a request. Picklable, so that workers can be spawned.

    `steps` is the length of the run in optimizer steps, `stride` the image pixels per latent, `channels` those of
    latents, `missing_mask` the mask value of images without a mask, `score` the aesthetic score of images without one.
    A file that cannot be read is tried again after each of `retry_delays`, in seconds. `fixed_draws` K above 0: the
    samples of a regularisation image go through K draws in turn, for which everything is known before the run.
    """

    images: ImageReader
    tokenize: Tokenize
    seed: int
    steps: int
    stride: int = 8
    channels: int = 4
    missing_mask: float = 1.0
    prior_loss_weight: float = 1.0
    fixed_draws: int = 0
    latents: LatentStore | None = None  # None: batches hold pixels
    crop_conditioning: CropConditioning = "exact"
    score: float = 7.0
    retry_delays: tuple[float, ...] = retries.DELAYS

    def __post_init__(self) -> None:
        if self.latents is None:
            return
        examples = {(record.subset, record.dataset): index for index, record in enumerate(self.images.records)}
        all_settings = map(self.images.settings, examples.values())
        if any(settings.random_crop or settings.colour or settings.face_crop for settings in all_settings):
            raise ValueError("random crops and colours have no effect on cached latents")

    def __getitem__(self, request: BatchRequest) -> Batch:
        """The batch of a request. A sample whose image, mask or latent cache cannot be read is in `unread`."""
        records = [self.images.records[index] for index, _ in request.samples]
        texts = tuple(self.caption(request.epoch, request.step, *sample) for sample in request.samples)
        geometries = [self.geometry(request.epoch, *sample) for sample in request.samples]
        images_and_masks, unread = self._images(request, geometries)
        stacked = torch.stack([image for image, _ in images_and_masks])
        sizes, score = self.sizes_and_scores([index for index, _ in request.samples], geometries)
        return Batch(
            pixels=stacked if self.latents is None else None,
            latents=None if self.latents is None else stacked,
            mask=self._stack_masks([mask for _, mask in images_and_masks], request.bucket)
            if self.images.has_masks
            else None,
            text_inputs=self.tokenize(texts),
            sizes=sizes,
            score=score,
            weights=torch.tensor(
                [0.0 if place in unread else self._weight(record) for place, record in enumerate(records)]
            ),
            is_reg=torch.tensor([record.is_reg for record in records]),
            sample_index=torch.tensor(
                [self._noise_key(request, place, *sample) for place, sample in enumerate(request.samples)]
            ),
            paths=tuple(str(record.path) for record in records),
            captions=texts,
            unread=tuple(unread.values()),
        )

    def caption(self, epoch: int, step: int, index: int, repeat: int) -> str:
        """The caption that this sample is trained with."""
        record = self.images.records[index]
        epoch, repeat = self._drawn_as(epoch, index, repeat)
        step = self.steps if self._is_fixed(index) else step
        rng = python_random(self.seed, "caption", epoch, record.key, repeat)
        caption_settings = self.images.subsets[record.subset].captions
        return captions.process(record.caption, caption_settings, rng, epoch, step, self.steps)

    def texts(self, requests: Iterable[BatchRequest]) -> Iterator[str]:
        """The captions of all samples of these requests, without reading an image."""
        for request in requests:
            for sample in request.samples:
                yield self.caption(request.epoch, request.step, *sample)

    def geometry(self, epoch: int, index: int, repeat: int) -> Geometry:
        """Scaling, crop and flip of this sample."""
        epoch, repeat = self._drawn_as(epoch, index, repeat)
        key = self.images.records[index].key
        # a stream per purpose: enabling one augmentation does not change the draws of the others
        crop, flip = (python_random(self.seed, purpose, epoch, key, repeat) for purpose in ("crop", "flip"))
        return self.images.geometry(index, crop, flip)

    def sizes_and_scores(
        self, indices: Sequence[int], geometries: Sequence[Geometry | None] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Size conditioning (B, 6) and aesthetic scores (B,) of records, float32: see Batch. `geometries`: of the
        samples; None: those of cached latents."""
        sizes = [
            self.images.sizes(index, self.crop_conditioning, geometry)
            for index, geometry in zip(indices, geometries or [None] * len(indices), strict=True)
        ]
        scores = [self.images.score(index, self.score) for index in indices]
        return torch.tensor(sizes, dtype=torch.float32), torch.tensor(scores, dtype=torch.float32)

    def _images(
        self, request: BatchRequest, geometries: Sequence[Geometry]
    ) -> tuple[list[ImageAndMask], dict[int, Unread]]:
        """Image and mask of each sample, and those that could not be read by their place in the batch."""
        reads = [
            partial(self._image, request.epoch, *sample, geometry)
            for sample, geometry in zip(request.samples, geometries, strict=True)
        ]
        results = retries.read_all(reads, self.retry_delays)
        unread = {
            place: Unread(
                request.first_sample + place,
                str(self.images.records[request.samples[place][0]].path),
                "; ".join(mistake.what for mistake in result.mistakes),
            )
            for place, result in enumerate(results)
            if isinstance(result, Unreadable)
        }
        return [self._grey(request.bucket) if isinstance(result, Unreadable) else result for result in results], unread

    def _is_fixed(self, index: int) -> bool:
        """Whether the samples of an image go through fixed draws."""
        return self.fixed_draws > 0 and self.images.records[index].is_reg

    def _drawn_as(self, epoch: int, index: int, repeat: int) -> tuple[int, int]:
        """Epoch and repeat by which the draws of a sample are keyed: its own, or for the fixed draw k epoch 1 and the
        repeat k."""
        if not self._is_fixed(index):
            return epoch, repeat
        return 1, ((epoch - 1) * self.images.records[index].repeats + repeat) % self.fixed_draws

    def _noise_key(self, request: BatchRequest, place: int, index: int, repeat: int) -> int:
        if not self._is_fixed(index):
            return request.first_sample + place
        return -1 - (index * self.fixed_draws + self._drawn_as(request.epoch, index, repeat)[1])

    def _weight(self, record: ImageRecord) -> float:
        return self.prior_loss_weight if record.is_reg else 1.0

    def _grey(self, bucket: Size) -> ImageAndMask:
        """What stands in for an image that could not be read. With it the batch keeps its shape, so that the random
        draws of other samples, and the backward passes of other processes, stay as they are."""
        width, height = bucket
        if self.latents is None:
            return torch.zeros(3, height, width), None
        return torch.zeros(self.channels, height // self.stride, width // self.stride), None

    def _image(self, epoch: int, index: int, repeat: int, geometry: Geometry) -> ImageAndMask:
        if self.latents is not None:
            cached = self.latents.get(index, geometry.flipped)
            return cached.latents, cached.mask
        pixels, mask = self.images.pixels(index, geometry), self.images.mask(index, geometry)
        if self.images.settings(index).colour:
            epoch, repeat = self._drawn_as(epoch, index, repeat)
            key = self.images.records[index].key
            pixels = images.vary_colour(pixels, python_random(self.seed, "colour", epoch, key, repeat))
        latent_mask = None
        if mask is not None:
            size = (geometry.bucket[0] // self.stride, geometry.bucket[1] // self.stride)
            latent_mask = masks.to_latent_size(torch.from_numpy(masks.to_float(mask)), size)
        return torch.from_numpy(images.to_float(pixels)), latent_mask

    def _stack_masks(self, image_masks: Sequence[torch.Tensor | None], bucket: Size) -> torch.Tensor:
        missing = torch.full((1, bucket[1] // self.stride, bucket[0] // self.stride), self.missing_mask)
        return torch.stack([missing if mask is None else mask for mask in image_masks])


class BatchLoader:
    """Prepares batches ahead, in the order of the requests, in a thread (workers=0) or in worker processes.

    Workers are spawned on every system, and live until the requests end, across epochs. Latents in memory would be
    copied to each worker: use workers=0 with them.
    """

    def __init__(self, dataset: TrainingDataset, *, workers: int = 0, pin_memory: bool = False) -> None:
        self._dataset = dataset
        self._requests = _Requests()
        self._running: Iterator[Batch] | None = None
        self._loader: DataLoader[Batch] = DataLoader(
            dataset,
            sampler=self._requests,
            batch_size=None,
            collate_fn=_identity,
            num_workers=workers,
            multiprocessing_context="spawn" if workers > 0 else None,
            worker_init_fn=_prepare_worker if workers > 0 else None,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # otherwise each iteration draws from torch's global generator
        )

    def batches(self, requests: Iterable[BatchRequest]) -> Iterator[tuple[BatchRequest, Batch]]:
        """Yield each request with its batch, in order; takes requests as workers become free. One iteration at a time.

        Raises UserError if a worker process dies.
        """
        if not self._loader.num_workers:
            yield from self._in_thread(requests)
            return
        self._requests.start(requests)
        with explain_dead_workers(), starting_processes(), _dead_workers_are_asked_for():
            batches = self._running = iter(self._loader)
        while True:
            try:
                with explain_dead_workers():
                    batch = next(batches, None)
            except (OSError, EOFError) as error:
                # a broken pipe to a dead worker; the message of an exception in a live worker begins with "Caught"
                if str(error).startswith("Caught"):
                    raise
                raise _dead_worker(error) from None
            if batch is None:
                return
            yield self._requests.next_done(), batch

    def _in_thread(self, requests: Iterable[BatchRequest]) -> Iterator[tuple[BatchRequest, Batch]]:
        """Prepare two batches ahead. Reading, decoding and tokenizing release the GIL, so training continues."""
        ahead: deque[tuple[BatchRequest, Future[Batch]]] = deque()
        with ThreadPoolExecutor(1, "batches") as thread:
            try:
                for request in requests:
                    ahead.append((request, thread.submit(self._build, request)))
                    if len(ahead) > 2:
                        first, batch = ahead.popleft()
                        yield first, batch.result()
                for first, batch in ahead:
                    yield first, batch.result()
            finally:
                thread.shutdown(cancel_futures=True)

    def _build(self, request: BatchRequest) -> Batch:
        batch = self._dataset[request]
        return batch.pin_memory() if self._loader.pin_memory else batch

    def close(self) -> None:
        """Stop the worker processes now. One that does not end by itself is killed: it listens to no other signal."""
        running, self._running = self._running, None
        shutdown = getattr(running, "_shutdown_workers", None)
        if shutdown is None:
            return
        try:
            shutdown()
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):  # a worker that crashes on exit has finished its work
                raise
        finally:
            for worker in getattr(running, "_workers", ()):
                if worker.is_alive():
                    worker.kill()
                    worker.join()


@contextmanager
def _dead_workers_are_asked_for() -> Iterator[None]:
    """Let torch not handle SIGCHLD: it would raise an error for a dead worker anywhere in the main thread, also in the
    middle of an optimizer step. Without, it looks whether workers live whenever a batch is late, after 5 s."""
    in_main_thread = os.name == "posix" and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if in_main_thread else None
    try:
        yield
    finally:
        if in_main_thread and before is not None:
            signal.signal(signal.SIGCHLD, before)


@contextmanager
def explain_dead_workers() -> Iterator[None]:
    """Turn torch's RuntimeError for a dead worker into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise _dead_worker(error) from None


def _dead_worker(error: Exception) -> UserError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    what = f"a process that prepares images died ({reason})"
    remedy = "lower --max_data_loader_n_workers, or set it to 0: memory or shared memory may be exhausted"
    return UserError([Mistake(what, remedy)])


class _Requests:
    """The sampler: the main process decides which batch is next and sends its request to the workers."""

    def __init__(self) -> None:
        self._upcoming: Iterable[BatchRequest] = ()
        self._sent: deque[BatchRequest] = deque()

    def start(self, requests: Iterable[BatchRequest]) -> None:
        """Set the requests of the next iteration."""
        self._upcoming = requests
        self._sent.clear()

    def __iter__(self) -> Iterator[BatchRequest]:
        for request in self._upcoming:
            self._sent.append(request)
            yield request

    def next_done(self) -> BatchRequest:
        """The oldest request that was sent but not returned here: batches arrive in the order of their requests."""
        return self._sent.popleft()


def _identity(batch: Any) -> Any:
    return batch


def _prepare_worker(_: int) -> None:
    import cv2

    end_with_parent()
    cv2.setNumThreads(1)  # the number of workers limits the cores used
    # Native libraries with running threads may abort while they are unloaded, which torch would report as a dead
    # worker. Python has finished by then, so exit without unloading.
    atexit.register(os._exit, 0)
