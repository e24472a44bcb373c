"""What is told of a sample's size and crop is what the sample shows. Images here tell where each pixel comes from:
red is its column, green its row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.batch import TextInput
from library.data.buckets import build_bucket_table
from library.data.cache.latent_cache import MemoryLatents
from library.data.dataset import TrainingDataset
from library.data.images import Geometry
from library.data.order import BatchRequest
from library.data.reading import ImageReader
from library.data.scan.scan import scan
from library.data.size_conditioning import sizes_of
from library.options.datasets import BucketSettings, DatasetSpec, ImageSettings, Size, SubsetSpec
from library.options.groups.dataset import CropConditioning
from tests.data.image_files import record

SQUARE = BucketSettings((64, 64))


def tokenize(captions: Sequence[str]) -> dict[str, TextInput]:
    return {"text_encoder": TextInput(torch.zeros(len(captions), 1, 77, dtype=torch.int64))}


def reader_of(path: Path, size: Size, buckets: BucketSettings, images: ImageSettings) -> ImageReader:
    spec = SubsetSpec(path.parent, "here", images=images)
    whole = DatasetSpec("here", buckets, (spec,))
    records = (record(path, size),)
    return ImageReader(records, build_bucket_table(records, [whole]).placements, (spec,), (whole,))


def dataset_of(
    path: Path, size: Size, images: ImageSettings, shown_as: Size, buckets: BucketSettings = SQUARE
) -> TrainingDataset:
    """One image of `size` whose colours are columns and rows of the image scaled to `shown_as`."""
    rows, columns = np.indices((size[1], size[0]))
    scaled = columns * shown_as[0] // size[0], rows * shown_as[1] // size[1], 0 * rows
    Image.fromarray(np.stack(scaled, axis=-1).astype(np.uint8)).save(path)
    reader = reader_of(path, size, buckets, images)
    return TrainingDataset(reader, tokenize, seed=3, steps=1)  # type: ignore[arg-type]


def requests(bucket: Size, count: int) -> list[BatchRequest]:
    return [BatchRequest(epoch, 0, bucket, ((0, 0),), 0, 1, True) for epoch in range(1, count + 1)]


@pytest.mark.parametrize(
    ("size", "buckets", "exact", "kohya"),
    [
        # formulas of the cover crop r = max(Wb / W, Hb / H), left = (r W - Wb) / 2, by hand; kohya's as its code gives
        ((1000, 2000), BucketSettings((1024, 1024)), (2000, 1000, 512, 0, 1024, 1024), (0, 256)),
        ((3000, 4000), BucketSettings((832, 1216)), (4000, 3000, 0, 40, 1216, 832), (53, 0)),
        ((512, 4096), BucketSettings((512, 2048)), (4096, 512, 1024, 0, 2048, 512), (0, 128)),  # its issue 1443
        ((300, 500), SQUARE, (500, 300, 21, 0, 64, 64), (0, 12)),  # 64 x 106.7 rounded to 107
        # smaller than the bucket: enlarged 3.2 times to 102.4 x 64
        ((32, 20), SQUARE, (20, 32, 0, 19, 64, 64), (12, 0)),
        # as it is, cut to whole steps: nothing is scaled
        ((100, 70), BucketSettings((1024, 1024), True, no_upscale=True), (70, 100, 3, 18, 64, 64), (9, 0)),
        # SimpleTuner's: scaled to 100 x 100 before the cut
        ((400, 400), BucketSettings((64, 64), shrink_to=100 * 100), (400, 400, 18, 18, 64, 64), (0, 0)),
    ],
)
def test_sizes_by_hand(
    size: Size, buckets: BucketSettings, exact: tuple[int, ...], kohya: tuple[int, int], tmp_path: Path
) -> None:
    reader = reader_of(tmp_path / "no such image.png", size, buckets, ImageSettings(random_crop=True, flip=True))
    assert reader.sizes(0) == reader.sizes(0, "exact") == exact
    assert reader.sizes(0, "kohya") == (*exact[:2], *kohya, *exact[4:])


def test_a_mirrored_letterbox_has_its_right_margin() -> None:
    """300x500 fits into 64x64 as 38.4x64: margins of 25.6, of which sd-scripts gives 12 to the left, 13.6 are right."""
    shown = Geometry((64, 107), (0, 5), (64, 64))
    assert sizes_of(shown, (300, 500), "kohya") == (500, 300, 0, 12, 64, 64)
    assert sizes_of(replace(shown, flipped=True), (300, 500), "kohya") == (500, 300, 0, 13, 64, 64)


@pytest.mark.parametrize("size", [(100, 90), (200, 180), (64, 90), (100, 64), (64, 64)])
def test_the_crop_is_told_that_the_pixels_show(tmp_path: Path, size: Size) -> None:
    """Random crops and mirror images of images that are scaled to a half or not at all."""
    factor = 2 if size == (200, 180) else 1
    shown_as = (size[0] // factor, size[1] // factor)
    by_edge = BucketSettings((64, 64), shrink_to=shown_as[0] * shown_as[1])
    data = dataset_of(tmp_path / "a.png", size, ImageSettings(random_crop=True, flip=True), shown_as, by_edge)
    seen = set()
    for request in requests((64, 64), 24):
        batch = data[request]
        assert batch.pixels is not None
        colours = ((batch.pixels[0] + 1) * 127.5).round().int()
        columns, rows = colours[0, 0].tolist(), colours[1, :, 0].tolist()
        flipped = columns[0] > columns[-1]
        left = shown_as[0] - 1 - columns[0] if flipped else columns[0]  # in the image as the sample mirrors it
        assert batch.sizes.tolist() == [[size[1], size[0], rows[0], left, 64, 64]]
        seen.add((left, rows[0], flipped))
    room = (shown_as[0] - 63) * (shown_as[1] - 63)
    assert len(seen) > min(room, 10) and {flipped for *_, flipped in seen} == {False, True}


def test_crops_around_a_face_are_told_in_the_scale_of_the_sample(tmp_path: Path) -> None:
    size = (240, 200)
    images = ImageSettings(face_crop=(1.0, 3.0), interpolation="nearest", flip=True)
    data = dataset_of(tmp_path / "a_120_90_40_50.png", size, images, size)
    scales = set()
    for epoch, request in enumerate(requests((64, 64), 12), 1):
        batch = data[request]
        assert batch.pixels is not None
        first = ((batch.pixels[0, :, 0, 0] + 1) * 127.5).round()
        resized = data.geometry(epoch, 0, 0).resized
        height, width, top, left, *target = batch.sizes[0].tolist()
        flipped = bool(batch.pixels[0, 0, 0, 0] > batch.pixels[0, 0, 0, -1])
        column = size[0] - 1 - first[0].item() if flipped else first[0].item()
        assert (width, height, target) == (*size, [64, 64])
        assert abs(left * size[0] / resized[0] - column) < 2 * size[0] / resized[0]
        assert abs(top * size[1] / resized[1] - first[1].item()) < 2 * size[1] / resized[1]
        scales.add(resized)
    assert len(scales) > 5


@pytest.mark.parametrize("mode", ["exact", "kohya"])
def test_cached_latents_are_told_of_as_pixels_are(tmp_path: Path, mode: CropConditioning) -> None:
    corner = ImageSettings(flip=True, corner_crop=True)
    pixels = replace(dataset_of(tmp_path / "a.png", (90, 64), corner, (90, 64)), crop_conditioning=mode)
    cached = replace(pixels, latents=MemoryLatents((torch.zeros(4, 8, 8),), (torch.ones(4, 8, 8),)))
    told = set()
    for request in requests((64, 64), 12):
        one, other = pixels[request], cached[request]
        assert other.latents is not None and torch.equal(one.sizes, other.sizes)
        told.add((bool(other.latents.max()), *other.sizes[0].tolist()[:4]))
    # the corner is the left edge, and the right one of the mirror image: 90 - 64; 64 x 45.5 leaves 9.2 above
    lefts = {False: 0, True: 26} if mode == "exact" else {False: 0, True: 0}
    assert told == {(flipped, 64, 90, 0 if mode == "exact" else 9, left) for flipped, left in lefts.items()}


def test_the_original_size_is_that_of_the_upright_image(tmp_path: Path) -> None:
    orientation = Image.Exif()
    orientation[0x0112] = 6  # turned by a quarter
    (tmp_path / "x").mkdir()
    Image.new("RGB", (90, 40)).save(tmp_path / "x" / "a.jpg", exif=orientation)
    whole = DatasetSpec("here", SQUARE, (SubsetSpec(tmp_path / "x", "here", class_tokens="a"),))
    found = scan([whole])
    reader = ImageReader(
        found.records, build_bucket_table(found.records, [whole]).placements, found.subsets, found.datasets
    )
    assert reader.sizes(0) == (90, 40, 40, 0, 64, 64)  # 40x90 to 64x144
