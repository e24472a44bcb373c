"""Cached latents are those of this picture, this crop and this VAE, or they are made anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from library.data import images
from library.data.buckets import BucketSettings, Placement, make_table
from library.data.cache import FINGERPRINT, Filled, cache_files, fill
from library.data.scan import ImageRecord
from library.options.mistakes import UserError
from tests.data.pictures import noise, record, save

CHOSEN = BucketSettings((64, 64), True, smallest=32, largest=128, step=8)


class Encoder:
    """A VAE in miniature: means over 8x8 blocks, plus noise of the picture's own generator."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def __call__(self, pixels: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        self.batches.append(tuple(pixels.shape))
        means = torch.nn.functional.avg_pool2d(pixels, 8)
        noise = [torch.randn(mean.shape, generator=g) for mean, g in zip(means, generators, strict=True)]
        return means + 0.1 * torch.stack(noise)


def pictures(folder: Path) -> list[ImageRecord]:
    sizes = [(64, 64), (80, 48), (64, 64), (81, 48)]
    return [record(save(folder / f"{name}.png", size), size) for name, size in zip("abcd", sizes, strict=True)]


def place(records: Sequence[ImageRecord]) -> tuple[Placement, ...]:
    return make_table(records, CHOSEN).placements


def filled(records: Sequence[ImageRecord], encoder: Encoder | None = None, **options: Any) -> Filled:
    keywords = {"vae": "v1", "suffix": "_sd.npz", "to_disk": True, "flip": False, "progress": False, **options}
    return fill(records, keywords.pop("placements", None) or place(records), encoder or Encoder(), **keywords)


def counts(found: Filled) -> tuple[int, int, int]:
    return found.read, found.made, found.stale


def same(one: Filled, other: Filled, number: int, flipped: bool = False) -> bool:
    return all(torch.equal(one.store.get(i, flipped), other.store.get(i, flipped)) for i in range(number))


def test_files_have_the_name_and_arrays_of_the_format(tmp_path: Path) -> None:
    records = pictures(tmp_path)
    encoder = Encoder()
    found = filled(records, encoder, flip=True, batch_size=2)
    assert counts(found) == (0, 4, 0)
    assert sorted(path.name for path in tmp_path.glob("*.npz")) == [
        "a_0064x0064_sd.npz", "b_0080x0048_sd.npz", "c_0064x0064_sd.npz", "d_0081x0048_sd.npz",
    ]  # fmt: skip
    placement = place(records)[3]
    with np.load(tmp_path / "d_0081x0048_sd.npz") as arrays:
        assert set(arrays) == {"latents", "latents_flipped", "original_size", "crop_ltrb", FINGERPRINT}
        width, height = placement.bucket
        assert arrays["latents"].dtype == np.float32 and arrays["latents"].shape == (3, height // 8, width // 8)
        assert arrays["original_size"].tolist() == [81, 48]
        left, top = images.centre_offset(placement)
        assert arrays["crop_ltrb"].tolist() == [left, top, left + width, top + height]
    # batches hold pictures of one bucket
    assert all(batch[0] <= 2 for batch in encoder.batches) and sum(batch[0] for batch in encoder.batches) == 8
    assert not list(tmp_path.glob("*.tmp"))


def test_latents_are_those_of_the_cropped_picture_and_its_mirror_image(tmp_path: Path) -> None:
    records = pictures(tmp_path)

    def means(pixels: torch.Tensor, _: list[torch.Generator]) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels, 8)

    found = fill(records, place(records), means, vae="v", suffix="_sd.npz", to_disk=False, flip=True, progress=False)
    for index, placement in enumerate(place(records)):
        pixels = images.fit(images.load(records[index].path), placement, images.centre_offset(placement))
        expected = means(torch.from_numpy(images.to_float(pixels))[None], [])[0]
        assert torch.allclose(found.store.get(index, False), expected, atol=1e-6)
        assert torch.allclose(found.store.get(index, True), expected.flip(-1), atol=1e-5)


def test_a_second_run_reads_and_any_batching_or_place_gives_the_same(tmp_path: Path) -> None:
    records = pictures(tmp_path)
    first = filled(records, batch_size=1)
    encoder = Encoder()
    second = filled(records, encoder, batch_size=3)
    assert counts(second) == (4, 0, 0) and not encoder.batches
    in_memory = filled(records, batch_size=3, to_disk=False)
    assert counts(in_memory) == (0, 4, 0)
    assert same(first, second, 4) and same(first, in_memory, 4)


def test_the_sample_belongs_to_the_content(tmp_path: Path) -> None:
    one, two = save(tmp_path / "a.png", (64, 64)), tmp_path / "elsewhere.png"
    two.write_bytes(one.read_bytes())
    found = filled([record(one, (64, 64)), record(two, (64, 64))], to_disk=False)
    assert torch.equal(found.store.get(0, False), found.store.get(1, False))


def test_whatever_changes_the_latents_makes_them_anew(tmp_path: Path) -> None:
    records = pictures(tmp_path)
    filled(records)
    assert counts(filled(records, vae="v2")) == (0, 4, 4)
    assert counts(filled(records)) == (0, 4, 4)
    noise((64, 64), seed=99).save(records[0].path)  # another picture under the same name and size
    assert counts(filled(records)) == (3, 1, 1)
    for bucket, resized in (((64, 48), (80, 48)), ((64, 48), (81, 49)), ((72, 48), (81, 49))):  # crop, scale, both
        moved = list(place(records))
        moved[1] = Placement(bucket, resized)
        assert counts(filled(records, placements=tuple(moved))) == (3, 1, 1)


def test_flip_adds_what_is_missing_and_takes_nothing_away(tmp_path: Path) -> None:
    records = pictures(tmp_path)
    plain = filled(records)
    mirrored = filled(records, flip=True)
    assert counts(mirrored) == (0, 4, 4) and same(plain, mirrored, 4)
    assert counts(filled(records)) == (4, 0, 0) and counts(filled(records, flip=True)) == (4, 0, 0)


def test_files_of_other_trainers_and_damaged_ones_are_made_anew(tmp_path: Path) -> None:
    records = pictures(tmp_path)
    files = cache_files(records, "_sd.npz")
    np.savez(files[0], latents=np.zeros((4, 8, 8), np.float32), original_size=[64, 64], crop_ltrb=[0, 0, 64, 64])
    files[1].write_bytes(b"")
    filled(records[2:3])
    files[2].write_bytes(files[2].read_bytes()[:-30])
    found = filled(records)
    assert counts(found) == (0, 4, 3) and "3 of them" in str(found)
    assert same(found, filled(records, to_disk=False), 4)


def test_pictures_of_one_stem_and_size_never_share_a_file(tmp_path: Path) -> None:
    names = ["a.png", "a.jpg", "A.webp", "a.png.png", "b.png", "b.jpg"]
    records = []
    for index, name in enumerate(names):
        size = (64, 72) if name == "b.jpg" else (64, 64)
        noise(size, seed=index).save(tmp_path / name)
        records.append(record(tmp_path / name, size))
    files = cache_files(records, "_sd.npz")
    assert len({file.name.casefold() for file in files}) == len(names)
    assert files[0].name.startswith("a.png") and files[4].name == "b_0064x0064_sd.npz"
    found = filled(records)
    assert counts(filled(records)) == (6, 0, 0)
    assert same(found, filled(records, to_disk=False), 6)


def test_latents_that_are_not_finite_stop_with_the_name(tmp_path: Path) -> None:
    records = pictures(tmp_path)

    def broken(pixels: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        latents = torch.zeros(len(pixels), 4, pixels.shape[2] // 8, pixels.shape[3] // 8)
        latents[-1, 0, 0, 0] = float("nan")
        return latents

    for to_disk in (False, True):
        with pytest.raises(UserError, match="c.png: the VAE gives latents that are not finite"):
            fill(
                records[:1] + records[2:3], place(records[:1] + records[2:3]), broken,
                vae="v", suffix="_sd.npz", to_disk=to_disk, flip=False, batch_size=2, progress=False,
            )  # fmt: skip
    assert not list(tmp_path.glob("*.npz")) and not list(tmp_path.glob("*.tmp"))


def test_what_cannot_be_read_or_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = pictures(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match="_sd.npz cannot be written"):
        filled(records)
    assert not list(tmp_path.glob("*.tmp"))
    monkeypatch.undo()
    with pytest.raises(UserError, match="gone.png cannot be read"):
        filled([replace(records[0], path=tmp_path / "gone.png")], placements=place(records[:1]))


def test_a_file_that_changes_during_the_run_is_noticed(tmp_path: Path) -> None:
    records = pictures(tmp_path)
    found = filled(records)
    filled(records[:1], vae="another run's")
    assert found.store.get(1, False) is not None
    with pytest.raises(UserError, match="a_0064x0064_sd.npz was removed or changed"):
        found.store.get(0, False)


def test_pictures_are_seen_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    noise((64, 48)).save(path, exif=exif)
    filled([record(path, (48, 64))])
    assert (tmp_path / "a_0048x0064_sd.npz").exists()
