"""Laws of the order: every sample once, from any step."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, groupby

import pytest

from library.data.order import NO_SHARD, BatchRequest, EpochOrder, Locality, Size


def order_of(
    buckets: Sequence[Size], repeats: Sequence[int], batch_size: int, accumulation: int = 1, seed: int = 0
) -> EpochOrder:
    """The order of one dataset."""
    datasets = [0] * len(buckets)
    return EpochOrder(datasets, buckets, repeats, batch_sizes=[batch_size], accumulation=accumulation, seed=seed)


def some_order(seed: int = 3, batch_size: int = 4, accumulation: int = 3, records: int = 23) -> EpochOrder:
    rng = random.Random(records)
    buckets: list[Size] = [rng.choice([(64, 64), (64, 128), (128, 64)]) for _ in range(records)]
    repeats = [rng.randint(1, 4) for _ in range(records)]
    return order_of(buckets, repeats, batch_size, accumulation, seed)


def windows(requests: list[BatchRequest]) -> list[list[BatchRequest]]:
    found: list[list[BatchRequest]] = [[]]
    for request in requests:
        found[-1].append(request)
        if request.last_of_window:
            found.append([])
    assert found.pop() == []
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 4, 7, 500])
@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_every_record_and_repeat_stands_once_in_an_epoch(batch_size: int, accumulation: int) -> None:
    rng = random.Random(1)
    buckets: list[Size] = [rng.choice([(64, 64), (64, 128), (128, 64)]) for _ in range(30)]
    repeats = [rng.randint(1, 5) for _ in buckets]
    order = order_of(buckets, repeats, batch_size, accumulation, 0)
    per_bucket: Counter[Size] = Counter()
    for bucket, count in zip(buckets, repeats, strict=True):
        per_bucket[bucket] += count
    for epoch in (1, 2):
        requests = list(order.requests(epoch))
        samples = [sample for request in requests for sample in request.samples]
        assert sorted(samples) == [(record, repeat) for record, count in enumerate(repeats) for repeat in range(count)]
        assert all(buckets[record] == request.bucket for request in requests for record, _ in request.samples)
        # per bucket ceil(n / batch size), the last one kept short
        assert len(requests) == sum(math.ceil(n / batch_size) for n in per_bucket.values()) == order.batches_per_epoch
        assert all(len(request.samples) <= batch_size for request in requests)
        assert order.samples_per_epoch == len(samples)


def test_windows_know_their_samples() -> None:
    order = some_order()
    for epoch in (1, 2, 3):
        found = windows(list(order.requests(epoch)))
        assert len(found) == order.steps_per_epoch == math.ceil(order.batches_per_epoch / 3)
        assert all(len(window) == 3 for window in found[:-1]) and 1 <= len(found[-1]) <= 3
        for window in found:
            assert {request.window_samples for request in window} == {sum(len(request.samples) for request in window)}


def test_the_sample_index_counts_through_the_run() -> None:
    order = some_order()
    expected = 0
    for request in chain.from_iterable(order.requests(epoch) for epoch in (1, 2, 3)):
        assert request.first_sample == expected
        expected += len(request.samples)


def test_a_run_can_start_at_any_step() -> None:
    order = some_order()
    whole = [window for epoch in (1, 2, 3) for window in windows(list(order.requests(epoch)))]
    for step in range(len(whole)):
        epoch, done = order.position(step)
        resumed = windows(list(some_order().requests(epoch, done)))
        for later in range(epoch + 1, 4):
            resumed += windows(list(some_order().requests(later)))
        assert resumed == whole[step:]


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def samples(order: EpochOrder, epoch: int) -> list[tuple[int, int]]:
        return [sample for request in order.requests(epoch) for sample in request.samples]

    assert samples(some_order(), 1) == samples(some_order(), 1)
    assert samples(some_order(), 1) != samples(some_order(), 2)
    assert samples(some_order(seed=3), 1) != samples(some_order(seed=4), 1)
    order = some_order()
    later = samples(order, 2)  # asking for epoch 2 first changes nothing
    assert samples(order, 1) == samples(some_order(), 1) and later == samples(some_order(), 2)


def test_batches_and_their_members_are_shuffled() -> None:
    order = order_of([(64, 64)] * 40 + [(64, 128)] * 40, [1] * 80, batch_size=4, seed=0)
    requests = list(order.requests(1))
    assert sum(1 for _ in groupby(requests, key=lambda request: request.bucket)) > 4
    assert all(list(request.samples) != sorted(request.samples) for request in requests[:1])
    places = [[r.samples[0][0] for r in order.requests(epoch)][0] for epoch in range(1, 60)]
    assert len(set(places)) > 20


def test_a_image_more_in_one_bucket_leaves_the_others_their_order() -> None:
    def members(extra: int) -> list[tuple[int, int]]:
        order = order_of([(64, 64)] * 20 + [(64, 128)] * (5 + extra), [1] * (25 + extra), batch_size=20, seed=0)
        return next(list(r.samples) for r in order.requests(1) if r.bucket == (64, 64))

    assert members(0) == members(1)


def test_what_makes_no_order_is_refused() -> None:
    with pytest.raises(ValueError):
        order_of([], [], batch_size=1, seed=0)
    with pytest.raises(ValueError):
        order_of([(64, 64)], [1, 1], batch_size=1, seed=0)
    with pytest.raises(ValueError):
        order_of([(64, 64)], [1], batch_size=0, seed=0)
    with pytest.raises(ValueError):
        next(some_order().requests(0))


def test_a_batch_holds_one_dataset_at_its_own_batch_size() -> None:
    datasets = [0] * 10 + [1] * 10
    order = EpochOrder(datasets, [(64, 64)] * 20, [1] * 20, batch_sizes=[2, 5], seed=0)
    assert order.batches_per_epoch == 5 + 2
    for epoch in (1, 2):
        for request in order.requests(epoch):
            of = {datasets[record] for record, _ in request.samples}
            assert len(of) == 1 and len(request.samples) == (2, 5)[of.pop()]


def test_requests_count_the_steps_of_the_run() -> None:
    order = some_order()
    steps = [request.step for epoch in (1, 2) for request in order.requests(epoch) if request.last_of_window]
    assert steps == list(range(2 * order.steps_per_epoch))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("accumulation", [1, 3, 4])
def test_several_processes_together_see_what_one_sees(world: int, accumulation: int) -> None:
    """Window by window; all ranks have the same number of windows, and of batches in each."""
    order = some_order(accumulation=accumulation)
    for epoch, skipped in ((1, 0), (2, 3)):
        alone = windows(list(order.requests(epoch, skipped)))
        ranks = [windows(list(order.requests(epoch, skipped, rank, world))) for rank in range(world)]
        assert {len(rank) for rank in ranks} == {len(alone)}
        for expected, *shares in zip(alone, *ranks, strict=True):
            assert {len(share) for share in shares} == {math.ceil(len(expected) / world)}
            together = [request for share in shares for request in share if request.is_counted]
            # each still knows its place in the run, from which its noise is drawn, and the samples of all
            together = [replace(request, last_of_window=False) for request in together]
            assert sorted(together, key=place) == [replace(request, last_of_window=False) for request in expected]
            for request in (request for share in shares for request in share if not request.is_counted):
                last = replace(expected[-1], last_of_window=request.last_of_window, is_counted=False)
                assert request == last


def place(request: BatchRequest) -> int:
    return request.first_sample


def test_a_rank_is_one_of_the_processes() -> None:
    for rank, world in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="rank < world"):
            next(some_order().requests(1, 0, rank, world))


SHARDS = [record // 4 for record in range(40)] + [NO_SHARD] * 10  # ten shards of four images, and ten files
BUCKETS: list[Size] = [(64, 64), (64, 128), (64, 64)] * 16 + [(64, 64)] * 2


def local_order(buffer: int, seed: int = 3) -> EpochOrder:
    locality = Locality(SHARDS, buffer)
    return EpochOrder(
        [0] * 50, BUCKETS, [2] * 50, batch_sizes=[3], accumulation=2, seed=seed, locality=locality
    )  # fmt: skip


@pytest.mark.parametrize("buffer", [1, 3, 10, 99])
def test_with_a_buffer_every_sample_stands_once_in_as_many_batches(buffer: int) -> None:
    order = local_order(buffer)
    whole = EpochOrder([0] * 50, BUCKETS, [2] * 50, batch_sizes=[3], accumulation=2, seed=3)
    for epoch in (1, 2):
        requests = list(order.requests(epoch))
        samples = [sample for request in requests for sample in request.samples]
        assert sorted(samples) == [(record, repeat) for record in range(50) for repeat in range(2)]
        assert all(BUCKETS[record] == request.bucket for request in requests for record, _ in request.samples)
        assert len(requests) == whole.batches_per_epoch


@pytest.mark.parametrize("buffer", [1, 3])
def test_a_shard_is_read_in_one_stretch_of_the_epoch(buffer: int) -> None:
    requests = list(local_order(buffer).requests(1))
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for place, request in enumerate(requests):
        for record, _ in request.samples:
            first.setdefault(SHARDS[record], place)
            last[SHARDS[record]] = place
    # a batch at the end of a group may be completed with samples of the next
    open_shards = [sum(first[shard] <= place <= last[shard] for shard in range(10)) for place in range(len(requests))]
    assert max(open_shards) <= 2 * buffer
    files = [place for place, request in enumerate(requests) if any(SHARDS[r] == NO_SHARD for r, _ in request.samples)]
    assert min(files) < len(requests) / 4 and max(files) > len(requests) * 3 / 4  # dealt over the epoch


def test_a_buffer_shuffles_shards_and_samples_anew_and_resumes_at_any_step() -> None:
    def shards(epoch: int, seed: int = 3) -> list[int]:
        requests = local_order(2, seed).requests(epoch)
        return list(dict.fromkeys(SHARDS[record] for request in requests for record, _ in request.samples))

    assert shards(1) != shards(2) and shards(1) != shards(1, seed=4) and shards(1) == shards(1)
    order = local_order(2)
    whole = windows(list(order.requests(2)))
    for done in range(len(whole)):
        assert windows(list(local_order(2).requests(2, done))) == whole[done:]


def test_ranks_share_the_order_with_a_buffer() -> None:
    alone = [request.samples for request in local_order(2).requests(1)]
    ranks = [list(local_order(2).requests(1, 0, rank, 3)) for rank in range(3)]
    together = [request.samples for turn in zip(*ranks, strict=True) for request in turn if request.is_counted]
    assert together == alone
