"""Which samples make which batch, in which order: a pure function of (seed, epoch).

Nothing here remembers what was drawn before, so a run may start at any optimiser step of any epoch and sees exactly
what it would have seen there. (sd-scripts shuffles what the epoch before left, and replays data after a resume.)

Words: a *sample* is (record index, repeat index); a *micro-batch* holds samples of one bucket; a *window* is the
`accumulation` micro-batches of one optimiser step. The last micro-batch of a bucket and the last window of an epoch may
be short: nothing is dropped and nothing is filled up, `window_samples` is what makes unequal ones count right.

Several processes (ranks) deal the micro-batches of each window out among themselves, so together they see what one
process sees, with the same draws. All ranks get equally many requests in every window, as a model whose weights are
spread over ranks computes only with all of them: a rank for which no micro-batch is left gets the window's last one
again with `is_counted` False. Its losses must then have the weight 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from library.runtime.seeds import python_random

Size = tuple[int, int]  # width, height
Sample = tuple[int, int]  # record index, repeat index
Place = tuple[int, Size]  # dataset index, bucket


@dataclass(frozen=True)
class BatchRequest:
    """All a worker needs to make one micro-batch."""

    epoch: int  # from 1
    step: int  # optimiser steps of the run before its window
    bucket: Size
    samples: tuple[Sample, ...]
    first_sample: int  # position of its first sample in the whole run, from 0
    window_samples: int  # Z: samples of all micro-batches of its optimiser step
    last_of_window: bool  # of those that the same rank gets
    is_counted: bool = True  # False: another rank has these samples; this one only takes part in computing


class EpochOrder:
    """The order of every epoch of a run.

    `datasets`, `buckets` and `repeats` are per record, in record order; `batch_sizes` per dataset. A micro-batch holds
    samples of one bucket of one dataset; `accumulation` of them, over all ranks, make a window. Raises ValueError for
    unequal lengths, for no sample at all, or for a batch size or accumulation below 1.
    """

    def __init__(
        self,
        datasets: Sequence[int],
        buckets: Sequence[Size],
        repeats: Sequence[int],
        *,
        batch_sizes: Sequence[int],
        accumulation: int = 1,
        seed: int,
    ) -> None:
        if not len(datasets) == len(buckets) == len(repeats):
            raise ValueError(f"{len(datasets)} datasets and {len(buckets)} buckets for {len(repeats)} records")
        if min(batch_sizes, default=0) < 1 or accumulation < 1:
            raise ValueError("batch size and accumulation are at least 1")
        self._places = tuple(zip(datasets, buckets, strict=True))
        self._repeats = tuple(repeats)
        self._batch_sizes = tuple(batch_sizes)
        self._accumulation = accumulation
        self._seed = seed
        counts: dict[Place, int] = {}
        for place, count in zip(self._places, self._repeats, strict=True):
            counts[place] = counts.get(place, 0) + count
        self.samples_per_epoch = sum(counts.values())
        if self.samples_per_epoch < 1:
            raise ValueError("no sample")
        self.batches_per_epoch = sum(-(-count // batch_sizes[dataset]) for (dataset, _), count in counts.items())
        self.steps_per_epoch = -(-self.batches_per_epoch // accumulation)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch from 1, windows of it already done) after `step` optimiser steps: the arguments of `requests`."""
        epochs, windows = divmod(step, self.steps_per_epoch)
        return epochs + 1, windows

    def requests(self, epoch: int, skip_windows: int = 0, rank: int = 0, world: int = 1) -> Iterator[BatchRequest]:
        """The micro-batches of an epoch (from 1) that process `rank` of `world` makes, without those of the epoch's
        first `skip_windows` optimiser steps."""
        if epoch < 1 or skip_windows < 0 or not 0 <= rank < world:
            raise ValueError("epochs count from 1, skipped windows from 0, ranks from 0 to one less than their number")
        batches = self._batches(epoch)
        first_sample = (epoch - 1) * self.samples_per_epoch
        first_step = (epoch - 1) * self.steps_per_epoch
        for window in range(self.steps_per_epoch):
            members = batches[window * self._accumulation : (window + 1) * self._accumulation]
            *firsts, end = accumulate((len(samples) for _, samples in members), initial=first_sample)
            rounds = -(-len(members) // world) if window >= skip_windows else 0
            for turn in range(rounds):
                place = turn * world + rank
                is_counted = place < len(members)
                bucket, samples = members[place if is_counted else -1]
                yield BatchRequest(
                    epoch=epoch,
                    step=first_step + window,
                    bucket=bucket,
                    samples=samples,
                    first_sample=firsts[place if is_counted else -1],
                    window_samples=end - firsts[0],
                    last_of_window=turn == rounds - 1,
                    is_counted=is_counted,
                )
            first_sample = end

    def _batches(self, epoch: int) -> list[tuple[Size, tuple[Sample, ...]]]:
        members: dict[Place, list[Sample]] = {}
        for record, (place, count) in enumerate(zip(self._places, self._repeats, strict=True)):
            members.setdefault(place, []).extend((record, repeat) for repeat in range(count))
        batches = []
        for dataset, bucket in sorted(members):
            samples = members[dataset, bucket]
            batch_size = self._batch_sizes[dataset]
            # each bucket has its own stream: an image more in one of them leaves the others as they were
            python_random(self._seed, "bucket order", epoch, dataset, *bucket).shuffle(samples)
            for start in range(0, len(samples), batch_size):
                batches.append((bucket, tuple(samples[start : start + batch_size])))
        python_random(self._seed, "batch order", epoch).shuffle(batches)
        return batches
