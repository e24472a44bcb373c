"""Batches are what their requests say, whoever makes them."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from library.data import images
from library.data.batch import Batch
from library.data.buckets import BucketSettings, make_table
from library.data.cache import MemoryLatents
from library.data.captions import CaptionSettings
from library.data.dataset import BatchLoader, TrainingDataset, describe_samples, explain_dead_workers
from library.data.images import ImageSettings
from library.data.order import BatchRequest, EpochOrder
from library.options.mistakes import UserError
from tests.data.pictures import record, save

SIZES = [(64, 64), (90, 48), (64, 64), (48, 90), (80, 80)]
DEADLY = "kill this worker"


def tokenize(captions: list[str]) -> torch.Tensor:
    """Code points, one chunk of 77. One caption is the end of the worker that meets it, as for want of memory."""
    if DEADLY in captions:
        os._exit(1)
    rows = [[ord(letter) for letter in caption.ljust(77)[:77]] for caption in captions]
    return torch.tensor(rows)[:, None]


def dataset(folder: Path, **options: object) -> TrainingDataset:
    records = [
        record(save(folder / f"{index}.png", size), size, repeats=2, is_reg=index > 2, caption=f"a, b, c, d{index}")
        for index, size in enumerate(SIZES)
    ]
    table = make_table(records, BucketSettings((64, 64), True, smallest=32, largest=128, step=8))
    made = TrainingDataset(tuple(records), table.placements, tokenize, seed=5, prior_loss_weight=0.25)
    return replace(made, **options)  # type: ignore[arg-type]


ALL = {"captions": CaptionSettings(True, 1, 0.2), "images": ImageSettings(True, True, True)}


def order(data: TrainingDataset, batch_size: int = 2) -> EpochOrder:
    return EpochOrder(
        [placement.bucket for placement in data.placements],
        [record.repeats for record in data.records],
        batch_size=batch_size,
        accumulation=2,
        seed=data.seed,
    )


def assert_same(one: Batch, other: Batch) -> None:
    assert (one.paths, one.captions) == (other.paths, other.captions)
    for name in ("pixels", "latents", "input_ids", "weights", "sample_index", "is_reg"):
        first, second = getattr(one, name), getattr(other, name)
        assert (first is None and second is None) or torch.equal(first, second), name


def test_a_batch_holds_what_the_request_says(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    request = BatchRequest(1, (64, 64), ((0, 1), (4, 0)), first_sample=30, window_samples=2, last_of_window=True)
    batch = data[request]
    assert batch.pixels is not None and batch.latents is None and len(batch) == 2
    assert batch.pixels.shape == (2, 3, 64, 64) and batch.pixels.dtype == torch.float32
    assert torch.equal(batch.pixels[0], torch.from_numpy(images.to_float(images.load(data.records[0].path))))
    assert batch.input_ids.shape == (2, 1, 77) and batch.input_ids.dtype == torch.int64
    assert batch.weights.tolist() == [1.0, 0.25] and batch.weights.dtype == torch.float32
    assert batch.is_reg.tolist() == [False, True]
    assert batch.sample_index.tolist() == [30, 31] and batch.sample_index.dtype == torch.int64
    assert batch.captions == ("a, b, c, d0", "a, b, c, d4")
    assert batch.paths == (str(tmp_path / "0.png"), str(tmp_path / "4.png"))


def test_draws_belong_to_epoch_picture_and_repeat(tmp_path: Path) -> None:
    data = dataset(tmp_path, **ALL)

    def sample(epoch: int, index: int, repeat: int, first: int) -> Batch:
        return data[BatchRequest(epoch, data.placements[index].bucket, ((index, repeat),), first, 1, True)]

    assert_same(replace(sample(1, 1, 0, 0), sample_index=torch.tensor([9])), sample(1, 1, 0, 9))
    variants = [sample(epoch, 1, repeat, 0) for epoch in range(1, 9) for repeat in range(2)]
    assert len({batch.captions for batch in variants}) > 3
    assert len({pickle.dumps(batch.pixels.numpy()) for batch in variants if batch.pixels is not None}) > 5


def test_one_augmentation_leaves_the_draws_of_another_alone(tmp_path: Path) -> None:
    both = dataset(tmp_path, images=ImageSettings(flip=True, colour=True))
    one = replace(both, images=ImageSettings(flip=True))
    requests = list(order(one).requests(1))
    equal = [torch.equal(both[request].pixels, one[request].pixels) for request in requests]  # type: ignore[arg-type]
    assert any(equal)  # colours vary in a third only: the rest is flipped alike
    assert all(both[request].captions == one[request].captions for request in requests)


def test_an_index_that_moves_changes_no_draw(tmp_path: Path) -> None:
    data = dataset(tmp_path, **ALL)
    fewer = replace(data, records=data.records[1:], placements=data.placements[1:])
    for repeat in range(2):
        before = data[BatchRequest(2, data.placements[1].bucket, ((1, repeat),), 0, 1, True)]
        assert_same(before, fewer[BatchRequest(2, data.placements[1].bucket, ((0, repeat),), 0, 1, True)])


def test_latents_are_flipped_by_the_coin_of_the_pixels(tmp_path: Path) -> None:
    pixels = dataset(tmp_path, images=ImageSettings(flip=True))
    plain = tuple(torch.zeros(4, p.bucket[1] // 8, p.bucket[0] // 8) for p in pixels.placements)
    store = MemoryLatents(plain, tuple(one + 1 for one in plain))
    cached = replace(pixels, latents=store)
    straight = replace(pixels, images=ImageSettings())
    coins = []
    for request in (r for epoch in range(1, 6) for r in order(pixels, 1).requests(epoch)):
        one, other, third = cached[request], pixels[request], straight[request]
        assert one.latents is not None and other.pixels is not None and third.pixels is not None and one.pixels is None
        coins.append(bool(one.latents.max()))
        assert torch.equal(other.pixels, third.pixels.flip(-1) if coins[-1] else third.pixels)
    assert 10 < sum(coins) < 40
    with pytest.raises(ValueError, match="no effect on cached latents"):
        replace(cached, images=ImageSettings(random_crop=True))


def test_workers_change_nothing_and_live_on(tmp_path: Path) -> None:
    data = dataset(tmp_path, **ALL)
    epochs = order(data)
    last = replace(data.records[0], caption=DEADLY)
    data = replace(data, records=(*data.records, last), placements=(*data.placements, data.placements[0]))
    data = replace(data, captions=CaptionSettings(shuffle=True))  # without dropout: that caption has to arrive
    alone = BatchLoader(data)
    workers = BatchLoader(data, workers=2, persistent=True)
    torch.manual_seed(0)
    expected_next = torch.rand(1)
    torch.manual_seed(0)
    list(islice(workers.batches(epochs.requests(1)), 2))  # left in the middle, as at the last step of a run
    for epoch, skipped in ((1, 1), (2, 0)):
        requests = list(epochs.requests(epoch, skipped))
        made = list(workers.batches(iter(requests)))
        assert len(made) == len(requests)
        for one, other in zip(made, alone.batches(requests), strict=True):
            assert_same(one, other)
    assert torch.equal(torch.rand(1), expected_next)  # the loader draws nothing from the global generator
    # what goes wrong over there comes home as a message
    data.records[1].path.write_bytes(b"overwritten during the run")
    for loader in (alone, workers):
        with pytest.raises(UserError, match=r"1\.png cannot be decoded") as caught:
            list(loader.batches(epochs.requests(3)))
        assert "Traceback" not in str(caught.value)
    deadly = BatchRequest(4, (64, 64), ((len(SIZES), 0),), 0, 1, True)
    with pytest.raises(UserError, match="died .* exited unexpectedly.*\n.*--max_data_loader_n_workers"):
        list(workers.batches([deadly]))


def test_other_errors_of_torch_pass_the_explanation() -> None:
    with pytest.raises(RuntimeError, match="CUDA"), explain_dead_workers():
        raise RuntimeError("CUDA out of memory")


def test_samples_are_described(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    lines = list(describe_samples(data, order(data).requests(1)))
    assert len(lines) == 10
    (line,) = [line for line in lines if "3.png repeat 2" in line]
    assert "48x90 in 48x80" in line and 'caption "a, b, c, d3"' in line and f"tokens [{ord('a')}, {ord(',')}" in line
    assert "regularisation" in line and "weight 0.25" in line
    assert len(list(describe_samples(data, order(data, 1).requests(1), limit=3))) == 3
