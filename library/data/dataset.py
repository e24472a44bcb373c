"""From a request to a batch, and the loader that keeps worker processes busy with requests.

The dataset has no state: a request holds all that differs from sample to sample, and every draw is keyed by (seed,
purpose, epoch, picture, repeat). So a batch is the same whichever worker makes it, and workers that outlive an epoch
need no word about the next one.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from library.data import captions, images
from library.data.batch import Batch
from library.data.buckets import Placement
from library.data.cache import LatentStore
from library.data.captions import CaptionSettings
from library.data.images import ImageSettings
from library.data.order import BatchRequest
from library.data.scan import ImageRecord
from library.options.mistakes import Mistake, UserError
from library.runtime.seeds import python_random

# captions -> ids (B, n, 77) int64; with workers it is pickled, so a function of a module or an object, no lambda
Tokenize = Callable[[list[str]], torch.Tensor]


@dataclass(frozen=True)
class TrainingDataset(Dataset[Batch]):
    """Makes the batch of a request. Picklable, so that workers can be started by spawn."""

    records: Sequence[ImageRecord]
    placements: Sequence[Placement]  # per record
    tokenize: Tokenize
    seed: int
    captions: CaptionSettings = CaptionSettings()
    images: ImageSettings = ImageSettings()
    prior_loss_weight: float = 1.0
    latents: LatentStore | None = None  # None: batches hold pixels

    def __post_init__(self) -> None:
        if self.latents is not None and (self.images.random_crop or self.images.colour):
            raise ValueError("random crops and colours have no effect on cached latents")

    def __getitem__(self, request: BatchRequest) -> Batch:
        """Raises UserError for a picture or latent cache that cannot be read."""
        records = [self.records[index] for index, _ in request.samples]
        texts = tuple(self.caption(request.epoch, *sample) for sample in request.samples)
        pictures = torch.stack([self._picture(request.epoch, *sample) for sample in request.samples])
        return Batch(
            pixels=pictures if self.latents is None else None,
            latents=None if self.latents is None else pictures,
            input_ids=self.tokenize(list(texts)),
            weights=torch.tensor([self.prior_loss_weight if record.is_reg else 1.0 for record in records]),
            sample_index=torch.arange(request.first_sample, request.first_sample + len(records)),
            is_reg=torch.tensor([record.is_reg for record in records]),
            paths=tuple(str(record.path) for record in records),
            captions=texts,
        )

    def caption(self, epoch: int, index: int, repeat: int) -> str:
        """The text that this sample is trained with."""
        record = self.records[index]
        rng = python_random(self.seed, "caption", epoch, record.key, repeat)
        return captions.process(record.caption, self.captions, rng, epoch)

    def _picture(self, epoch: int, index: int, repeat: int) -> torch.Tensor:
        record, placement = self.records[index], self.placements[index]
        # a stream for each purpose: switching one augmentation on leaves the draws of the others alone
        flipped = self.images.flip and python_random(self.seed, "flip", epoch, record.key, repeat).random() < 0.5
        if self.latents is not None:
            return self.latents.get(index, flipped)
        offset = images.centre_offset(placement)
        if self.images.random_crop:
            offset = images.random_offset(placement, python_random(self.seed, "crop", epoch, record.key, repeat))
        pixels = images.fit(images.load(record.path, record.size), placement, offset)
        if self.images.colour:
            pixels = images.vary_colour(pixels, python_random(self.seed, "colour", epoch, record.key, repeat))
        return torch.from_numpy(images.to_float(images.mirror(pixels) if flipped else pixels))


def describe_samples(
    dataset: TrainingDataset, requests: Iterable[BatchRequest], limit: int | None = None
) -> Iterator[str]:
    """A line per sample of the first `limit` batches, for --debug_dataset: each is really made. Opens no window."""
    for request in islice(requests, limit):
        batch = dataset[request]
        for place, (index, repeat) in enumerate(request.samples):
            width, height = dataset.records[index].size
            tokens = batch.input_ids[place].flatten().tolist()
            kind = "regularisation" if dataset.records[index].is_reg else "training"
            yield (
                f"epoch {request.epoch} sample {int(batch.sample_index[place])} ({kind}): {batch.paths[place]} "
                f"repeat {repeat + 1}, {width}x{height} in {request.bucket[0]}x{request.bucket[1]}, "
                f'weight {float(batch.weights[place]):g}, caption "{batch.captions[place]}", tokens {tokens}'
            )


class BatchLoader:
    """Batches of one epoch after another, made here (workers=0) or by worker processes, in the order of the requests.

    Workers are started by spawn on every system; `persistent` keeps them from epoch to epoch. Latents in memory would
    be copied into each worker: use workers=0 with them.
    """

    def __init__(
        self, dataset: TrainingDataset, *, workers: int = 0, persistent: bool = False, pin_memory: bool = False
    ) -> None:
        self._requests = _Requests()
        self._running: Iterator[Batch | _Failed] | None = None
        self._loader: DataLoader[Batch | _Failed] = DataLoader(
            _Guarded(dataset),
            sampler=self._requests,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=workers,
            persistent_workers=persistent and workers > 0,
            multiprocessing_context="spawn" if workers > 0 else None,
            worker_init_fn=_prepare_worker if workers > 0 else None,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else each epoch draws from torch's global generator
        )

    def batches(self, requests: Iterable[BatchRequest]) -> Iterator[Batch]:
        """The batch of each request, in order. One iteration at a time.

        Raises UserError for what a request raises, and when a worker process dies.
        """
        self._requests.current = list(requests)
        with explain_dead_workers():
            batches = self._running = iter(self._loader)
        while True:
            try:
                with explain_dead_workers():
                    batch = next(batches, None)
            except (OSError, EOFError) as error:
                # the pipe to a dead worker; what a living one raises comes with "Caught ..." before it
                if not self._loader.num_workers or str(error).startswith("Caught"):
                    raise
                raise _dead_worker(error) from None
            if batch is None:
                return
            if isinstance(batch, _Failed):
                raise UserError(batch.mistakes)
            yield batch

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
    what = f"a process that prepares pictures died ({reason})"
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
        self.current: list[BatchRequest] = []

    def __iter__(self) -> Iterator[BatchRequest]:
        return iter(self.current)

    def __len__(self) -> int:
        return len(self.current)


def _unchanged(batch: Any) -> Any:
    return batch


def _prepare_worker(_: int) -> None:
    import cv2

    cv2.setNumThreads(1)  # there are as many workers as the user wants cores to work
    # Native libraries that still have threads may abort while they are unloaded, which torch would report as a dead
    # worker. Python has finished by then: leave without unloading.
    atexit.register(os._exit, 0)
