"""Order of samples and batches: a pure function of (seed, epoch).

There is no state, so a run can start at any optimizer step of any epoch with the same data as an uninterrupted run.
(sd-scripts shuffles the order of the previous epoch, and replays data after a resume.)

Terms: a *sample* is (record index, repeat index); a *batch* has samples of one bucket; a *window* is the `accumulation`
batches of one optimizer step. The last batch of a bucket and the last window of an epoch may be smaller: nothing is
dropped or padded, and `window_samples` weights unequal batches correctly.

Several processes (ranks) share the batches of each window, so together they see the data of a single process, with the
same random draws. All ranks get the same number of requests per window, because a sharded model needs all ranks to
compute: a rank without a batch of its own gets the last batch of the window again with `is_counted` False, and must
weight its losses with 0.
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
    """Everything a worker needs to build a batch."""

    epoch: int  # from 1
    step: int  # optimizer steps of the run before its window
    bucket: Size
    samples: tuple[Sample, ...]
    first_sample: int  # position of its first sample in the whole run, from 0
    window_samples: int  # Z: samples of all batches of its optimizer step
    last_of_window: bool  # the last of this rank in its window
    is_counted: bool = True  # False: another rank trains these samples; this one only computes along


class EpochOrder:
    """The order of every epoch of a run.

    `datasets`, `buckets` and `repeats` are per record; `batch_sizes` per dataset. A batch has samples of one bucket of
    one dataset; `accumulation` batches, over all ranks, are a window. Raises ValueError for unequal lengths, no
    samples, or a batch size or accumulation below 1.
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
            raise ValueError("batch size and accumulation must be at least 1")
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
            raise ValueError("no samples")
        self.batches_per_epoch = sum(-(-count // batch_sizes[dataset]) for (dataset, _), count in counts.items())
        self.steps_per_epoch = -(-self.batches_per_epoch // accumulation)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch from 1, completed windows in it) after `step` optimizer steps: the arguments of `requests`."""
        epochs, windows = divmod(step, self.steps_per_epoch)
        return epochs + 1, windows

    def requests(self, epoch: int, skip_windows: int = 0, rank: int = 0, world: int = 1) -> Iterator[BatchRequest]:
        """The batches of process `rank` of `world` in an epoch (from 1), without those of its first `skip_windows`
        optimizer steps."""
        if epoch < 1 or skip_windows < 0 or not 0 <= rank < world:
            raise ValueError("needs epoch >= 1, skip_windows >= 0 and 0 <= rank < world")
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
            # a stream per bucket: adding an image to one does not change the others
            python_random(self._seed, "bucket order", epoch, dataset, *bucket).shuffle(samples)
            for start in range(0, len(samples), batch_size):
                batches.append((bucket, tuple(samples[start : start + batch_size])))
        python_random(self._seed, "batch order", epoch).shuffle(batches)
        return batches
