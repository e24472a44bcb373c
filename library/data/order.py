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

With a shard buffer, only so many shards are read at a time: the shards are shuffled and taken in groups of this size,
and an epoch goes through the groups one after the other, its samples and batches shuffled within each. The samples that
do not fill a batch are completed from the next group, so the number of batches is the same in both orders.

An epoch is kept as arrays of numbers, 8 bytes for each sample and batch: no objects, however many samples there are.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from library.runtime.seeds import python_random

Size = tuple[int, int]  # width, height
Sample = tuple[int, int]  # record index, repeat index
Place = tuple[int, Size]  # dataset index, bucket

NO_SHARD = -1


@dataclass(frozen=True)
class Locality:
    """Which shards are read together. `shards`: number of the shard of each record, or NO_SHARD for one that is a file
    of its own; `buffer`: how many shards are read at a time."""

    shards: Sequence[int]
    buffer: int


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
    one dataset; `accumulation` batches, over all ranks, are a window. `locality` None: samples may follow each other
    in any order. Raises ValueError for unequal lengths, no samples, or a batch size, accumulation or buffer below 1.
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
        locality: Locality | None = None,
    ) -> None:
        if not len(datasets) == len(buckets) == len(repeats):
            raise ValueError(f"{len(datasets)} datasets and {len(buckets)} buckets for {len(repeats)} records")
        if min(batch_sizes, default=0) < 1 or accumulation < 1:
            raise ValueError("batch size and accumulation must be at least 1")
        if locality is not None and (locality.buffer < 1 or len(locality.shards) != len(repeats)):
            raise ValueError("needs a buffer of at least one shard, and the shard of each record")
        self._firsts = array("Q", accumulate(repeats, initial=0))  # number of the first sample of each record
        members: dict[Place, array[int]] = {}
        for record, place in enumerate(zip(datasets, buckets, strict=True)):
            numbers = members.setdefault(place, array("Q"))
            numbers.extend(range(self._firsts[record], self._firsts[record + 1]))
        self._members = {place: members[place] for place in sorted(members) if members[place]}
        self._batch_sizes = tuple(batch_sizes)
        self._accumulation = accumulation
        self._seed = seed
        self._locality = locality
        self.samples_per_epoch = self._firsts[-1]
        if self.samples_per_epoch < 1:
            raise ValueError("no samples")
        self.batches_per_epoch = sum(map(self._batches_of, self._members))
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
            members = batches.some(window * self._accumulation, (window + 1) * self._accumulation)
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

    def _batches_of(self, place: Place) -> int:
        return -(-len(self._members[place]) // self._batch_sizes[place[0]])

    def _batches(self, epoch: int) -> _Batches:
        turns = None if self._locality is None else _turns(self._locality, self._seed, epoch)
        samples, batches = array("Q"), array("Q")
        batch_turns = array("Q")  # the group in which each batch is read: that of its first sample
        runs: list[_Run] = []
        for place, members in self._members.items():
            dataset, bucket = place
            runs.append(_Run(bucket, len(samples), len(members), len(batches), self._batch_sizes[dataset]))
            # a stream per bucket: adding an image to one does not change the others
            shuffled = members[:]
            python_random(self._seed, "bucket order", epoch, dataset, *bucket).shuffle(shuffled)
            if turns is not None:
                groups = turns.sort(shuffled, self._record_of)
                ends = list(accumulate(map(len, groups)))
                shuffled = _joined(groups)
                starts = range(0, len(shuffled), self._batch_sizes[dataset])
                batch_turns.extend(bisect_right(ends, start) for start in starts)
            samples.extend(shuffled)
            batches.extend(range(len(batches), len(batches) + self._batches_of(place)))
        python_random(self._seed, "batch order", epoch).shuffle(batches)
        if turns is not None:
            batches = _joined(_grouped(batches, turns.count, batch_turns.__getitem__))
        return _Batches(runs, samples, batches, self._sample)

    def _record_of(self, number: int) -> int:
        return bisect_right(self._firsts, number) - 1

    def _sample(self, number: int) -> Sample:
        record = self._record_of(number)
        return record, number - self._firsts[record]


@dataclass(frozen=True)
class _Run:
    """The samples and batches of one bucket: where they begin among those of the epoch, and how many there are."""

    bucket: Size
    first_sample: int
    samples: int
    first_batch: int
    batch_size: int


@dataclass(frozen=True)
class _Batches:
    """The batches of an epoch: `samples` by bucket in their order, `order` the numbers of the batches in theirs."""

    runs: Sequence[_Run]
    samples: array[int]
    order: array[int]
    sample_of: Callable[[int], Sample]

    def some(self, start: int, stop: int) -> list[tuple[Size, tuple[Sample, ...]]]:
        """The batches at these positions of the epoch, each with its bucket."""
        return [self._batch(number) for number in self.order[start:stop]]

    def _batch(self, number: int) -> tuple[Size, tuple[Sample, ...]]:
        run = self.runs[bisect_right(self.runs, number, key=lambda each: each.first_batch) - 1]
        start = (number - run.first_batch) * run.batch_size
        stop = min(start + run.batch_size, run.samples)
        numbers = self.samples[run.first_sample + start : run.first_sample + stop]
        return run.bucket, tuple(map(self.sample_of, numbers))


@dataclass(frozen=True)
class _Turns:
    """The groups of shards of an epoch, in their order: how many, and the group of each shard."""

    count: int
    of_shard: Mapping[int, int]
    shards: Sequence[int]  # of the records

    def sort(self, numbers: array[int], record_of: Callable[[int], int]) -> list[array[int]]:
        """The samples of each group, in their order. Those without a shard are dealt out evenly."""
        free = sum(self.shards[record_of(number)] == NO_SHARD for number in numbers)
        dealt = iter(range(free))

        def group(number: int) -> int:
            shard = self.shards[record_of(number)]
            return next(dealt) * self.count // free if shard == NO_SHARD else self.of_shard[shard]

        return _grouped(numbers, self.count, group)


def _turns(locality: Locality, seed: int, epoch: int) -> _Turns:
    shards = sorted(set(locality.shards) - {NO_SHARD})
    python_random(seed, "shard order", epoch).shuffle(shards)
    of_shard = {shard: place // locality.buffer for place, shard in enumerate(shards)}
    return _Turns(max(1, -(-len(shards) // locality.buffer)), of_shard, locality.shards)


def _grouped(numbers: array[int], count: int, group: Callable[[int], int]) -> list[array[int]]:
    groups = [array("Q") for _ in range(count)]
    for number in numbers:
        groups[group(number)].append(number)
    return groups


def _joined(groups: Sequence[array[int]]) -> array[int]:
    joined = array("Q")
    for group in groups:
        joined.extend(group)
    return joined
