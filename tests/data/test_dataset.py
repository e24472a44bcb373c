"""Batches depend on their requests only, not on the worker."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import torch

from library.data import images
from library.data.batch import Batch, TextInput
from library.data.buckets import build_bucket_table
from library.data.cache.latent_cache import CachedLatents, MemoryLatents
from library.data.dataset import BatchLoader, TrainingDataset, explain_dead_workers
from library.data.order import BatchRequest, EpochOrder, Sample
from library.data.reading import ImageReader
from library.options.datasets import BucketSettings, CaptionSettings, DatasetSpec, ImageSettings, Size, SubsetSpec
from library.options.mistakes import Mistake, UserError
from tests.data.image_files import record, save

SIZES = [(64, 64), (90, 48), (64, 64), (48, 90), (80, 80)]
DEADLY = "kill this worker"


def tokenize(captions: Sequence[str]) -> dict[str, TextInput]:
    """Code points, one chunk of 77. One caption kills the worker that reads it, like exhausted memory."""
    if DEADLY in captions:
        os._exit(1)
    rows = [[ord(letter) for letter in caption.ljust(77)[:77]] for caption in captions]
    return {"text_encoder": TextInput(torch.tensor(rows)[:, None])}


PLAIN, AS_THEY_ARE = ImageSettings(), CaptionSettings()
BUCKETS = BucketSettings((64, 64), True, smallest=32, largest=128, step=8)


def dataset(
    folder: Path, images: ImageSettings = PLAIN, captions: CaptionSettings = AS_THEY_ARE, **subset: Any
) -> TrainingDataset:
    spec = SubsetSpec(folder, "here", images=images, captions=captions, **subset)
    whole = DatasetSpec("here", BUCKETS, (spec,))
    records = [
        record(save(folder / f"{index}.png", size), size, repeats=2, is_reg=index > 2, caption=f"a, b, c, d{index}")
        for index, size in enumerate(SIZES)
    ]
    table = build_bucket_table(records, [whole])
    reader = ImageReader(tuple(records), table.placements, (spec,), (whole,))
    return TrainingDataset(  # type: ignore[arg-type]
        reader, tokenize, seed=5, steps=100, prior_loss_weight=0.25, retry_delays=()
    )


def with_settings(data: TrainingDataset, **settings: Any) -> TrainingDataset:
    """The same images with other settings of their subset."""
    (spec,) = data.images.subsets
    return replace(data, images=replace(data.images, subsets=(replace(spec, **settings),)))


def with_records(data: TrainingDataset, places: Sequence[int], **first: Any) -> TrainingDataset:
    """The selected records; `first` changes the last one."""
    reader = data.images
    records = [reader.records[place] for place in places]
    records[-1] = replace(records[-1], **first)
    placements = tuple(reader.placements[place] for place in places)
    return replace(data, images=replace(reader, records=tuple(records), placements=placements))


ALL: dict[str, Any] = {"captions": CaptionSettings(True, 1, 0.2), "images": ImageSettings(True, True, True)}


def order(data: TrainingDataset, batch_size: int = 2) -> EpochOrder:
    return EpochOrder(
        [record.dataset for record in data.images.records],
        [placement.bucket for placement in data.images.placements],
        [record.repeats for record in data.images.records],
        batch_sizes=[batch_size],
        accumulation=2,
        seed=data.seed,
    )


def request_of(epoch: int, bucket: Size, samples: Sequence[Sample], first: int = 0) -> BatchRequest:
    """A window of one batch."""
    return BatchRequest(epoch, 0, bucket, tuple(samples), first, len(samples), last_of_window=True)


def assert_same(one: Batch, other: Batch) -> None:
    assert (one.paths, one.captions) == (other.paths, other.captions)
    assert torch.equal(one.text_inputs["text_encoder"].ids, other.text_inputs["text_encoder"].ids)
    for name in ("pixels", "latents", "mask", "sizes", "score", "weights", "sample_index"):
        first, second = getattr(one, name), getattr(other, name)
        assert (first is None and second is None) or torch.equal(first, second), name


def test_a_batch_holds_what_the_request_says(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    request = request_of(1, (64, 64), ((0, 1), (4, 0)), first=30)
    batch = data[request]
    assert batch.pixels is not None and batch.latents is None and len(batch) == 2
    assert batch.pixels.shape == (2, 3, 64, 64) and batch.pixels.dtype == torch.float32
    assert torch.equal(batch.pixels[0], torch.from_numpy(images.to_float(images.load(data.images.records[0].path))))
    ids = batch.text_inputs["text_encoder"].ids
    assert ids.shape == (2, 1, 77) and ids.dtype == torch.int64
    assert batch.weights.tolist() == [1.0, 0.25] and batch.weights.dtype == torch.float32
    assert batch.sizes.tolist() == [[64, 64, 0, 0, 64, 64], [80, 80, 0, 0, 64, 64]]
    assert batch.sizes.dtype == torch.float32
    assert batch.sample_index.tolist() == [30, 31] and batch.sample_index.dtype == torch.int64
    assert batch.captions == ("a, b, c, d0", "a, b, c, d4")
    assert batch.paths == (str(tmp_path / "0.png"), str(tmp_path / "4.png"))


@pytest.mark.parametrize("cached", [False, True])
def test_a_sample_that_cannot_be_read_is_grey_and_weighs_nothing(cached: bool, tmp_path: Path) -> None:
    """The others of its batch are as they were."""
    data = dataset(tmp_path, mask_dir=tmp_path)
    if cached:
        data = replace(data, latents=Cached())  # type: ignore[arg-type]
    request = request_of(1, (64, 64), ((0, 1), (2, 0), (4, 0)), first=30)
    before = data[request]
    Cached.lost.append(2)
    data.images.records[2].path.unlink()
    batch = data[request]
    Cached.lost.clear()
    (unread,) = batch.unread
    assert not before.unread and (unread.position, unread.path) == (31, str(tmp_path / "2.png"))
    assert "cache" in unread.reason if cached else unread.reason.count("2.png") == 1 and "No such" in unread.reason
    assert batch.weights.tolist() == [1.0, 0.0, 0.25]
    images, earlier = (one.latents if cached else one.pixels for one in (batch, before))
    assert images is not None and earlier is not None and images.shape == earlier.shape
    assert not images[1].any() and torch.equal(images[[0, 2]], earlier[[0, 2]])
    assert batch.mask is not None and torch.equal(batch.mask[1], torch.ones(1, 8, 8))  # an empty mask has no mean
    assert batch.captions == before.captions and torch.equal(batch.sizes, before.sizes)


class Cached:
    """A cache on disk; records in `lost` cannot be read."""

    lost: ClassVar[list[int]] = []

    def get(self, record: int, flipped: bool) -> CachedLatents:
        if record in self.lost:
            raise UserError([Mistake(f"latent cache {record} was removed")])
        return CachedLatents(torch.full((4, 8, 8), record + 1.0), torch.full((1, 8, 8), 0.5))


def test_a_image_without_a_score_has_that_of_the_run(tmp_path: Path) -> None:
    data = with_records(dataset(tmp_path), [0, 2], score=0.0)
    request = request_of(1, (64, 64), ((0, 0), (1, 0)))
    score = data[request].score
    assert score.tolist() == [7.0, 0.0] and score.dtype == torch.float32
    assert replace(data, score=5.5)[request].score.tolist() == [5.5, 0.0]


def test_draws_belong_to_epoch_image_and_repeat(tmp_path: Path) -> None:
    data = dataset(tmp_path, **ALL)

    def sample(epoch: int, index: int, repeat: int, first: int) -> Batch:
        return data[request_of(epoch, data.images.placements[index].bucket, ((index, repeat),), first)]

    assert_same(replace(sample(1, 1, 0, 0), sample_index=torch.tensor([9])), sample(1, 1, 0, 9))
    variants = [sample(epoch, 1, repeat, 0) for epoch in range(1, 9) for repeat in range(2)]
    assert len({batch.captions for batch in variants}) > 3
    assert len({pickle.dumps(batch.pixels.numpy()) for batch in variants if batch.pixels is not None}) > 5


def test_one_augmentation_leaves_the_draws_of_another_alone(tmp_path: Path) -> None:
    both = dataset(tmp_path, images=ImageSettings(flip=True, colour=True))
    one = with_settings(both, images=ImageSettings(flip=True))
    requests = list(order(one).requests(1))
    equal = [torch.equal(both[request].pixels, one[request].pixels) for request in requests]  # type: ignore[arg-type]
    assert any(equal)  # colours vary in a third only: the rest is flipped alike
    assert all(both[request].captions == one[request].captions for request in requests)


def test_an_index_that_moves_changes_no_draw(tmp_path: Path) -> None:
    data = dataset(tmp_path, **ALL)
    fewer = with_records(data, range(1, 5))
    bucket = data.images.placements[1].bucket
    for repeat in range(2):
        before = data[request_of(2, bucket, ((1, repeat),))]
        assert_same(before, fewer[request_of(2, bucket, ((0, repeat),))])


def test_latents_are_flipped_by_the_coin_of_the_pixels(tmp_path: Path) -> None:
    pixels = dataset(tmp_path, images=ImageSettings(flip=True))
    plain = tuple(torch.zeros(4, p.bucket[1] // 8, p.bucket[0] // 8) for p in pixels.images.placements)
    store = MemoryLatents(plain, tuple(one + 1 for one in plain))
    cached = replace(pixels, latents=store)
    straight = with_settings(pixels, images=ImageSettings())
    coins = []
    for request in (r for epoch in range(1, 6) for r in order(pixels, 1).requests(epoch)):
        one, other, third = cached[request], pixels[request], straight[request]
        assert one.latents is not None and other.pixels is not None and third.pixels is not None and one.pixels is None
        coins.append(bool(one.latents.max()))
        assert torch.equal(other.pixels, third.pixels.flip(-1) if coins[-1] else third.pixels)
    assert 10 < sum(coins) < 40
    with pytest.raises(ValueError, match="no effect on cached latents"):
        with_settings(cached, images=ImageSettings(random_crop=True))


@pytest.mark.slow
def test_workers_change_nothing_and_live_on(tmp_path: Path) -> None:
    data = dataset(tmp_path, **ALL)
    epochs = order(data)
    data = with_records(data, [0, 1, 2, 3, 4, 0], caption=DEADLY)
    data = with_settings(data, captions=CaptionSettings(shuffle=True))  # without dropout: that caption has to arrive
    alone = BatchLoader(data)
    workers = BatchLoader(data, workers=2)
    torch.manual_seed(0)
    expected_next = torch.rand(1)
    torch.manual_seed(0)
    list(islice(workers.batches(epochs.requests(1)), 2))  # left in the middle, as at the last step of a run
    for epoch, skipped in ((1, 1), (2, 0)):
        requests = list(epochs.requests(epoch, skipped))
        made = list(workers.batches(iter(requests)))
        assert [request for request, _ in made] == requests
        for (_, one), (_, other) in zip(made, alone.batches(requests), strict=True):
            assert_same(one, other)
    assert torch.equal(torch.rand(1), expected_next)  # the loader draws nothing from the global generator
    # what cannot be read over there comes home as a mark
    data.images.records[1].path.write_bytes(b"overwritten during the run")
    here, there = (list(loader.batches(epochs.requests(3))) for loader in (alone, workers))
    for (_, one), (_, other) in zip(here, there, strict=True):
        assert_same(one, other)
        assert one.unread == other.unread
    lost = [sample for _, batch in there for sample in batch.unread]
    assert len(lost) == 2 and all("1.png cannot be decoded" in sample.reason for sample in lost)
    deadly = request_of(4, (64, 64), ((len(SIZES), 0),))
    with pytest.raises(UserError, match="died .* exited unexpectedly.*\n.*--max_data_loader_n_workers"):
        list(workers.batches([deadly]))


def ctrl_c() -> None:
    """What a terminal does: SIGINT to this worker and to the process that starts it."""
    os.kill(os.getppid(), signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


class CtrlC:
    """Becomes a Ctrl-C where it is read."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return ctrl_c, ()


@dataclass
class InterruptsTheStart:
    """Tokenizes nothing. A worker that reads it presses Ctrl-C, before it has got the rest of its arguments: more than
    a pipe holds, so the other process is still writing."""

    pressed: CtrlC | None = None
    rest: bytes = b""

    def __call__(self, texts: Sequence[str]) -> dict[str, TextInput]:
        raise AssertionError(texts)

    def __reduce__(self) -> tuple[type[InterruptsTheStart], tuple[CtrlC, bytes]]:
        return InterruptsTheStart, (CtrlC(), bytes(2**20))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="os.kill ends processes of Windows")
def test_an_interrupt_while_workers_start_leaves_none_behind_and_prints_no_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = replace(dataset(tmp_path), tokenize=InterruptsTheStart())
    loader = BatchLoader(data, workers=2)
    with pytest.raises(KeyboardInterrupt), closing(loader):
        next(loader.batches(order(data).requests(1)))
    for process in psutil.Process().children():
        if "spawn_main" in " ".join(process.cmdline()):  # a worker that is still printing why it ends
            process.wait()
    assert not multiprocessing.active_children()
    assert capfd.readouterr().err == ""


def test_other_errors_of_torch_pass_the_explanation() -> None:
    with pytest.raises(RuntimeError, match="CUDA"), explain_dead_workers():
        raise RuntimeError("CUDA out of memory")


@pytest.mark.slow
def test_the_next_epoch_is_asked_for_before_this_one_ends(tmp_path: Path) -> None:
    """Workers get requests ahead across epochs: there is no gap between epochs."""
    data = dataset(tmp_path)
    asked: list[int] = []

    def requests() -> Iterator[BatchRequest]:
        for epoch in (1, 2):
            for request in order(data).requests(epoch):
                asked.append(request.epoch)
                yield request

    batches = BatchLoader(data, workers=2).batches(requests())
    in_first = len(list(order(data).requests(1)))
    for _ in range(in_first):
        next(batches)
    assert asked.count(2) >= 2


def test_masks_follow_the_images_and_a_missing_one_counts_fully(tmp_path: Path) -> None:
    """Images that are their own masks: at one pixel per latent the mask is the luminance (ITU-R BT.601) of the image
    under every augmentation, up to rounding."""
    images = ImageSettings(random_crop=True, flip=True)
    data = replace(dataset(tmp_path / "train", images=images, mask_dir=tmp_path / "train"), stride=1)
    reader = data.images
    own = tuple(replace(one, mask=one.name if index != 4 else None) for index, one in enumerate(reader.records))
    data = replace(data, images=replace(reader, records=own))
    for request in order(data).requests(3):
        batch = data[request]
        assert batch.pixels is not None and batch.mask is not None
        for path, pixels, mask in zip(batch.paths, batch.pixels, batch.mask, strict=True):
            if path.endswith("4.png"):
                assert torch.equal(mask, torch.ones_like(mask))
            else:
                luminance = torch.einsum("chw,c->hw", pixels / 2 + 0.5, torch.tensor([0.299, 0.587, 0.114]))
                assert torch.allclose(mask[0], luminance, atol=2 / 255)


def test_inverted_masks_leave_images_without_one_alone(tmp_path: Path) -> None:
    data = replace(dataset(tmp_path, mask_dir=tmp_path), missing_mask=0.0)
    batch = data[request_of(1, (64, 64), ((0, 0),))]
    assert batch.mask is not None and torch.equal(batch.mask, torch.zeros(1, 1, 8, 8))


def test_the_texts_of_requests_are_those_of_their_batches(tmp_path: Path) -> None:
    data = dataset(tmp_path, **ALL)
    requests = [request for epoch in (1, 2) for request in order(data).requests(epoch)]
    assert list(data.texts(requests)) == [text for request in requests for text in data[request].captions]
