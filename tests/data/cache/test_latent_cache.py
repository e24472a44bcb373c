"""Cached latents belong to this image, mask, crop and VAE, or are encoded again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from library.data import images
from library.data.buckets import Placement
from library.data.cache import latent_files
from library.data.cache.latent_cache import LatentCacheBuild, build_latent_cache
from library.data.cache.latent_entries import LatentSource, list_entries
from library.data.cache.latent_files import FINGERPRINT
from library.data.colour_profiles import ProfileUse
from library.data.images import Geometry
from library.data.scan.image_record import ImageRecord
from library.options.mistakes import UserError
from tests.data.image_files import noise, record, save
from tests.small_disk import mounted

ROOT = Path(__file__).resolve().parents[3]
PLACES = {
    (64, 64): Placement((64, 64), (64, 64)),
    (80, 48): Placement((72, 48), (80, 48)),
    (81, 48): Placement((72, 48), (81, 48)),
}
FORMATS = pytest.mark.parametrize("form", ["safetensors", "npz"])


class Encoder:
    """A miniature VAE: means over 8x8 blocks, plus noise from the image's generator."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def __call__(self, pixels: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        self.batches.append(tuple(pixels.shape))
        means = torch.nn.functional.avg_pool2d(pixels, 8)
        noise = [torch.randn(mean.shape, generator=g) for mean, g in zip(means, generators, strict=True)]
        return means + 0.1 * torch.stack(noise)


def means(pixels: torch.Tensor, _: list[torch.Generator]) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(pixels, 8)


class Data:
    """Records with their sources, and a plain reader."""

    def __init__(self, records: Sequence[ImageRecord], sources: Sequence[LatentSource] | None = None) -> None:
        self.records = list(records)
        self.sources = list(sources or (self.centred(one) for one in self.records))

    @staticmethod
    def centred(one: ImageRecord, **options: Any) -> LatentSource:
        place = PLACES[one.size]
        offset = tuple((a - b) // 2 for a, b in zip(place.resized, place.bucket, strict=True))
        return LatentSource(Geometry(place.resized, (offset[0], offset[1]), place.bucket), **options)

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        source, path = self.sources[index], self.records[index].path
        (left, top), (width, height) = source.geometry.offset, source.geometry.bucket
        box = (left, top, left + width, top + height)
        image = Image.fromarray(images.load(path)).resize(source.geometry.resized).crop(box)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        mask = None
        if source.mask is not None:
            mask = Image.open(source.mask).convert("L")
        elif source.alpha_mask:
            mask = Image.open(path).convert("RGBA").getchannel("A")
        if mask is None:
            return pixels, None
        return pixels, torch.from_numpy(np.array(mask.resize(source.geometry.resized).crop(box))).float() / 255


def save_images(folder: Path) -> list[ImageRecord]:
    sizes = [(64, 64), (80, 48), (64, 64), (81, 48)]
    return [record(save(folder / f"{name}.png", size), size) for name, size in zip("abcd", sizes, strict=True)]


def filled(data: Data | Sequence[ImageRecord], encoder: Any = None, **options: Any) -> LatentCacheBuild:
    data = data if isinstance(data, Data) else Data(data)
    keywords = {"vae": "v1", "suffix": "_sd.npz", "to_disk": True, "flip": False, "progress": False, **options}
    if "form" in keywords:
        keywords["cache_format"] = keywords.pop("form")
    if isinstance(keywords["flip"], bool):
        keywords["flip"] = [keywords["flip"]] * len(data.records)
    placements = [Placement(source.geometry.bucket, source.geometry.resized) for source in data.sources]
    source = keywords.pop("source", data.sources.__getitem__)
    return build_latent_cache(data.records, placements, data.read, encoder or Encoder(), source=source, **keywords)


def counts(found: LatentCacheBuild) -> tuple[int, int, int]:
    return found.read, found.encoded, found.outdated


def same(one: LatentCacheBuild, other: LatentCacheBuild, number: int, flipped: bool = False) -> bool:
    """Equal latents and masks of the first records."""
    pairs = [(one.store.get(i, flipped), other.store.get(i, flipped)) for i in range(number)]
    return all(
        torch.equal(a.latents, b.latents)
        and (a.mask is None) == (b.mask is None)
        and (a.mask is None or b.mask is None or torch.equal(a.mask, b.mask))
        for a, b in pairs
    )


def entries(folder: Path) -> list[str]:
    return sorted(
        path.name for path in folder.rglob("*") if path.name.endswith((".npz", ".safetensors", ".dreamfolder-tmp"))
    )


# what stands in the files


def test_npz_files_have_the_names_and_arrays_of_the_format(tmp_path: Path) -> None:
    records = save_images(tmp_path)
    encoder = Encoder()
    sources = [Data.centred(one, alpha_mask=one is records[3]) for one in records]
    assert counts(filled(Data(records, sources), encoder, flip=True, batch_size=2, form="npz")) == (0, 4, 0)
    assert entries(tmp_path) == [
        "a_0064x0064_sd.npz", "b_0080x0048_sd.npz", "c_0064x0064_sd.npz", "d_0081x0048_sd.npz",
    ]  # fmt: skip
    with np.load(tmp_path / "d_0081x0048_sd.npz", allow_pickle=False) as arrays:
        written = {"latents", "latents_flipped", "original_size", "crop_ltrb", "alpha_mask"}
        assert set(arrays) == {*written, FINGERPRINT}
        assert arrays["latents"].dtype == np.float32 and arrays["latents"].shape == (3, 6, 9)
        assert arrays["alpha_mask"].dtype == np.float32 and arrays["alpha_mask"].shape == (48, 72)
        assert arrays["original_size"].tolist() == [81, 48]
        assert arrays["crop_ltrb"].tolist() == [4, 0, 76, 48]
    # batches hold images of one bucket
    assert all(batch[0] <= 2 for batch in encoder.batches) and sum(batch[0] for batch in encoder.batches) == 8


def test_latents_are_those_of_the_cropped_image_and_its_mirror_image(tmp_path: Path) -> None:
    data = Data(save_images(tmp_path))
    for to_disk in (False, True):
        found = filled(data, means, flip=True, to_disk=to_disk)
        for index in range(4):
            expected = means(data.read(index)[0][None], [])[0]
            assert torch.allclose(found.store.get(index, False).latents, expected, atol=1e-6)
            assert torch.allclose(found.store.get(index, True).latents, expected.flip(-1), atol=1e-5)
            assert found.store.get(index, True).mask is None


def test_without_a_source_the_centre_is_cached(tmp_path: Path) -> None:
    records = save_images(tmp_path)
    assert same(filled(records, to_disk=False), filled(records, to_disk=False, source=None), 4)
    filled(records)
    assert counts(filled(records, source=None)) == (4, 0, 0)


@FORMATS
def test_masks_lie_beside_their_latents_and_turn_with_them(tmp_path: Path, form: str) -> None:
    masked = save(tmp_path / "masks" / "a.png", (64, 64))
    noise((64, 64), mode="L", seed=5).save(masked)
    noise((80, 48), mode="RGBA").save(tmp_path / "b.png")
    records = [record(save(tmp_path / "a.png", (64, 64)), (64, 64)), record(tmp_path / "b.png", (80, 48))]
    sources = [Data.centred(records[0], mask=masked), Data.centred(records[1], alpha_mask=True)]
    data = Data([*records, replace(records[0], repeats=2)], [*sources, Data.centred(records[0])])
    on_disk, in_memory = filled(data, flip=True, form=form), filled(data, flip=True, to_disk=False)
    assert same(on_disk, in_memory, 3) and same(on_disk, in_memory, 3, flipped=True)
    for index in (0, 1):
        _, mask = data.read(index)
        assert mask is not None
        blocks = mask.reshape(mask.shape[0] // 8, 8, mask.shape[1] // 8, 8).mean((1, 3))[None]
        for flipped in (False, True):
            stored = on_disk.store.get(index, flipped).mask
            assert stored is not None and stored.dtype == torch.float32
            assert torch.allclose(stored, blocks.flip(-1) if flipped else blocks, atol=1e-5)
    assert on_disk.store.get(2, False).mask is None
    assert counts(filled(data, flip=True, form=form)) == (3, 0, 0)


# what is made again, and what is not


@FORMATS
def test_a_second_run_reads_and_any_batching_or_place_gives_the_same(tmp_path: Path, form: str) -> None:
    records = save_images(tmp_path)
    first = filled(records, batch_size=1, form=form)
    encoder = Encoder()
    second = filled(records, encoder, batch_size=3, form=form)
    assert counts(second) == (4, 0, 0) and not encoder.batches
    in_memory = filled(records, batch_size=3, to_disk=False)
    assert counts(in_memory) == (0, 4, 0)
    assert same(first, second, 4) and same(first, in_memory, 4)


def test_the_sample_belongs_to_the_content(tmp_path: Path) -> None:
    one, two = save(tmp_path / "a.png", (64, 64)), tmp_path / "elsewhere.png"
    two.write_bytes(one.read_bytes())
    found = filled([record(one, (64, 64)), record(two, (64, 64))], to_disk=False)
    assert torch.equal(found.store.get(0, False).latents, found.store.get(1, False).latents)


@FORMATS
def test_a_changed_image_or_mask_makes_exactly_its_entry_anew(tmp_path: Path, form: str) -> None:
    records = save_images(tmp_path)
    mask_paths = [save(tmp_path / "masks" / one.path.name, one.size) for one in records]
    data = Data(records, [Data.centred(one, mask=path) for one, path in zip(records, mask_paths, strict=True)])
    filled(data, form=form)
    noise((64, 64), seed=99).save(records[0].path)  # another image under the same name and size
    assert counts(filled(data, form=form)) == (3, 1, 1)
    noise((64, 64), seed=98, mode="L").save(mask_paths[2])
    assert counts(filled(data, form=form)) == (3, 1, 1)
    os.utime(records[1].path, (1, 1))  # touched, not changed
    assert counts(filled(data, form=form)) == (4, 0, 0)
    assert same(filled(data, form=form), filled(data, to_disk=False), 4)


def test_only_an_image_that_is_converted_to_srgb_has_another_key() -> None:
    """The key is that of caches that were written before images were converted."""

    def key(profile: ProfileUse) -> str:
        image = replace(record(Path("/x/a.png"), (80, 48)), profile=profile)
        source = LatentSource(Geometry((107, 64), (21, 0), (64, 64)))
        (entry,), _ = list_entries([image], lambda _: source, [False], "vae")
        return entry.settings

    assert key("") == key("unusable") == "21e967ba1963bfa10cf8d0116d8d07ac"
    assert key("converted") != key("")


@FORMATS
def test_whatever_else_the_latents_depend_on_makes_them_anew(tmp_path: Path, form: str) -> None:
    records = save_images(tmp_path)
    records[1] = replace(records[1], transparent=True)
    filled(records, form=form)
    assert filled(records, vae="v2", form=form).encoded == 4
    geometry = Data(records).sources[1].geometry
    others = [
        LatentSource(replace(geometry, offset=(0, 0))),
        LatentSource(replace(geometry, resized=(81, 48))),
        LatentSource(replace(geometry, bucket=(64, 48))),
        LatentSource(replace(geometry, resized=(81, 48), interpolation="cubic")),
        LatentSource(geometry, background=(0, 0, 0)),
        LatentSource(geometry, alpha_mask=True),
        LatentSource(geometry, mask=save(tmp_path / "masks" / "b.png", (80, 48))),
    ]
    seen = []
    for other in others:
        filled(records, form=form)
        sources = list(Data(records).sources)
        sources[1] = other
        found = filled(Data(records, sources), form=form)
        assert (found.read, found.encoded) == (3, 1), other
        seen.append(found)
    # what has no effect on an image is nothing to make it anew for: how to scale what is not scaled, what lies behind
    # an opaque one
    filled(records, form=form)
    sources = [replace(one, background=(9, 9, 9)) for one in Data(records).sources]
    sources[1] = LatentSource(replace(geometry, interpolation="cubic"))
    assert counts(filled(Data(records, sources), form=form)) == (4, 0, 0)


def test_entries_of_other_settings_stay(tmp_path: Path) -> None:
    records = save_images(tmp_path)
    first = filled(records)
    other = filled(records, vae="v2")
    assert counts(other) == (0, 4, 0)
    assert counts(filled(records)) == (4, 0, 0) and counts(filled(records, vae="v2")) == (4, 0, 0)
    assert same(first, filled(records), 4)  # a run that is still going on keeps its files


@FORMATS
def test_a_mirror_image_is_added_to_what_is_there(tmp_path: Path, form: str) -> None:
    records = save_images(tmp_path)
    plain = filled(records, form=form)
    encoder = Encoder()
    mirrored = filled(records, encoder, flip=[True, False, True, True], form=form)
    assert counts(mirrored) == (1, 3, 0) and same(plain, mirrored, 4)
    assert sum(batch[0] for batch in encoder.batches) == 3  # the images themselves are not encoded again
    assert counts(filled(records, form=form)) == (4, 0, 0)
    whole = filled(records, flip=True, form=form)
    assert counts(whole) == (3, 1, 0)
    in_memory = filled(records, flip=True, to_disk=False)
    assert same(whole, in_memory, 4) and same(whole, in_memory, 4, flipped=True)


@FORMATS
@pytest.mark.usefixtures("later")
def test_a_second_run_reads_no_image_and_a_touched_one_only_once(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = save_images(tmp_path)
    filled(records, form=form)
    hashed = []
    take = latent_files.FileHash.of_file
    monkeypatch.setattr(latent_files.FileHash, "of_file", lambda path: hashed.append(path) or take(path))
    assert counts(filled(records, form=form)) == (4, 0, 0) and not hashed
    os.utime(records[2].path, (1, 1))
    assert counts(filled(records, form=form)) == (4, 0, 0) and hashed == [str(records[2].path)]
    assert counts(filled(records, form=form)) == (4, 0, 0) and len(hashed) == 1


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the mtimes of the test's images back by a minute."""
    now = time.time_ns
    monkeypatch.setattr(latent_files.time, "time_ns", lambda: now() + 60_000_000_000)


@FORMATS
@pytest.mark.usefixtures("later")
def test_skip_check_looks_at_shapes_alone(tmp_path: Path, form: str) -> None:
    records = save_images(tmp_path)
    filled(records, form=form)
    noise((64, 64), seed=99).save(records[0].path)
    found = filled(records, form=form, skip_check=True)
    assert counts(found) == (4, 0, 0)
    assert found.store.get(0, False).latents.shape == (3, 8, 8)
    assert filled(records, form=form, skip_check=True, channels=4).encoded == 4
    assert filled(records, form=form, skip_check=True, flip=True).encoded == 4


# names


@FORMATS
def test_images_of_one_stem_and_size_never_share_a_file(tmp_path: Path, form: str) -> None:
    names = ["a.png", "a.jpg", "A.webp", "a.png.png", "b.png", "b.jpg"]
    records = []
    for index, name in enumerate(names):
        size = (80, 48) if name == "b.jpg" else (64, 64)
        noise(size, seed=index).save(tmp_path / name)
        records.append(record(tmp_path / name, size))
    found = filled(records, form=form)
    assert counts(found) == (0, 6, 0) and len({name.casefold() for name in entries(tmp_path)}) == 6
    assert ("b_0064x0064_sd.npz" in entries(tmp_path)) == (form == "npz")
    assert counts(filled(records, form=form)) == (6, 0, 0)
    assert same(found, filled(records, to_disk=False), 6)
    # one alone, and one that comes later: the entry of the first is found under either name
    assert counts(filled(records[:1], form=form)) == (1, 0, 0)
    assert counts(filled(records, form=form)) == (6, 0, 0)


@FORMATS
def test_one_image_at_several_resolutions_has_as_many_entries(tmp_path: Path, form: str) -> None:
    records = save_images(tmp_path)
    small = [LatentSource(Geometry((48, 48), (0, 0), (48, 48))), LatentSource(Geometry((40, 24), (0, 0), (40, 24)))]
    alone = filled(records[:2], form=form)
    data = Data([*records[:2], *records[:2]], [*Data(records[:2]).sources, *small])
    found = filled(data, form=form)
    assert counts(found) == (2, 2, 0) and same(alone, found, 2)
    assert found.store.get(0, False).latents.shape == (3, 8, 8) and found.store.get(2, False).latents.shape == (3, 6, 6)
    assert counts(filled(data, form=form)) == (4, 0, 0) and same(found, filled(data, to_disk=False), 4)
    assert counts(filled(records[:2], form=form)) == (2, 0, 0)
    assert counts(filled(Data(records[:2], small), form=form)) == (2, 0, 0)


def test_equal_records_share_an_entry(tmp_path: Path) -> None:
    records = save_images(tmp_path)
    for to_disk in (False, True):
        encoder = Encoder()
        found = filled([*records, *records], encoder, to_disk=to_disk, flip=[False] * 4 + [True] * 4)
        assert counts(found) == (0, 4, 0) and sum(batch[0] for batch in encoder.batches) == 8
        again = filled(records, to_disk=False, flip=True)
        assert same(found, again, 4) and same(found, again, 4, flipped=True)


@FORMATS
@pytest.mark.parametrize("name", ["猫" * 80, "кот 'и' \"пёс\"" if os.name == "posix" else "кот", "😀 a  b", "x" * 246])
def test_any_name_of_a_image_will_do(tmp_path: Path, form: str, name: str) -> None:
    records = [record(save(tmp_path / f"{name}{ending}", (64, 64)), (64, 64)) for ending in (".png", ".jpg")]
    found = filled(records, form=form)
    assert counts(filled(records, form=form)) == (2, 0, 0) and same(found, filled(records, to_disk=False), 2)


# files of other programs


def foreign(path: Path, like: LatentCacheBuild, index: int, **changed: Any) -> Path:
    """An .npz as sd-scripts writes it, with latents unlike those of any image here."""
    latents = like.store.get(index, False).latents.numpy() + 1
    arrays = {"latents": latents, "original_size": np.array([64, 64]), "crop_ltrb": np.zeros(4), **changed}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@FORMATS
def test_files_of_other_programs_are_read_when_they_fit(tmp_path: Path, form: str) -> None:
    one = save_images(tmp_path)[:1]
    plain = filled(one, to_disk=False)
    path = foreign(tmp_path / "a_0064x0064_sd.npz", plain, 0)
    found = filled(one, form=form)
    assert (found.read, found.encoded, found.third_party) == (1, 0, 1) and "another program" in str(found)
    assert torch.allclose(found.store.get(0, False).latents, plain.store.get(0, False).latents + 1)
    assert entries(tmp_path) == [path.name]
    foreign(path, plain, 0, latents=np.zeros((3, 8, 8), np.float32))
    with pytest.raises(UserError, match="a_0064x0064_sd.npz was removed, damaged or changed"):
        found.store.get(0, False)
    assert filled(one, form=form, trust_third_party=False).third_party == 0


@pytest.mark.parametrize(
    "changed",
    [
        {"latents": None},
        {"latents": np.zeros((3, 8, 9), np.float32)},
        {"latents": np.zeros((8, 8), np.float32)},
        {"latents": np.full((3, 8, 8), np.nan, np.float32)},
        {"latents": np.zeros((3, 8, 8), np.int64)},
        {"original_size": np.array([128, 128])},
    ],
    ids=str,
)
def test_files_of_other_programs_that_do_not_fit_are_left_alone(tmp_path: Path, changed: dict[str, Any]) -> None:
    one = save_images(tmp_path)[:1]
    plain = filled(one, to_disk=False)
    path = foreign(tmp_path / "a_0064x0064_sd.npz", plain, 0, **changed)
    before = path.read_bytes()
    found = filled(one)
    assert (counts(found), found.third_party) == ((0, 1, 1), 0) and same(found, plain, 1)
    assert path.read_bytes() == before


def test_files_of_other_programs_that_may_be_of_something_else_are_not_read(tmp_path: Path) -> None:
    records = save_images(tmp_path)
    one = records[:1]
    plain = filled(one, to_disk=False)
    path = foreign(tmp_path / "a_0064x0064_sd.npz", plain, 0)
    geometry = Data(one).sources[0].geometry
    for options in (
        {"flip": True},
        {"channels": 4},
        {"stride": 4},
        {"source": lambda _: LatentSource(geometry, alpha_mask=True)},
        {"source": lambda _: LatentSource(geometry, mask=save(tmp_path / "masks" / "a.png", (64, 64)))},
        {"source": lambda _: LatentSource(replace(geometry, resized=(80, 80), offset=(8, 8), interpolation="cubic"))},
        {"source": lambda _: LatentSource(replace(geometry, resized=(80, 64), offset=(0, 0)))},
    ):
        assert filled(one, means, **options, vae=str(options)[:12]).third_party == 0, options
    assert filled([replace(one[0], transparent=True)], vae="transparent").third_party == 0
    assert filled([replace(one[0], profile="converted")], vae="profile").third_party == 0
    masked = Data([replace(one[0], transparent=True)], [LatentSource(geometry, alpha_mask=True)])
    foreign(path, plain, 0, alpha_mask=np.full((64, 64), 0.5, np.float32))
    found = filled(masked, vae="masked")
    assert found.third_party == 1 and torch.equal(found.store.get(0, False).mask, torch.full((1, 8, 8), 0.5))
    assert filled(one, vae="plain").store.get(0, False).mask is None
    shared = [*one, record(save(tmp_path / "a.jpg", (64, 64)), (64, 64))]
    assert filled(shared, vae="shared").third_party == 0  # whose is it?
    os.utime(path, (1, 1))  # older than its image
    assert filled(one, vae="older").third_party == 0


# what goes wrong


@FORMATS
def test_damaged_files_are_made_anew(tmp_path: Path, form: str) -> None:
    records = save_images(tmp_path)
    whole = filled(records, form=form, flip=True)
    files = [tmp_path / name for name in entries(tmp_path)]
    files[0].write_bytes(b"")
    files[1].write_bytes(files[1].read_bytes()[:-30])
    changed = bytearray(files[2].read_bytes())
    changed[len(changed) // 2] ^= 1
    files[2].write_bytes(changed)
    found = filled(records, form=form, flip=True)
    assert counts(found) == (1, 3, 3) and "3 of them" in str(found)
    assert same(found, whole, 4) and same(found, whole, 4, flipped=True)
    assert same(found, filled(records, to_disk=False), 4)


class Broken:
    """Gives NaN for images of one seed, in any batch."""

    def __init__(self, *brightness: float) -> None:
        self.brightness = brightness

    def __call__(self, pixels: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        latents = Encoder()(pixels, generators)
        for place, one in enumerate(pixels):
            if any(abs(float(one.mean()) - wanted) < 1e-6 for wanted in self.brightness):
                latents[place, 0, 0, 0] = float("nan")
        return latents


@pytest.mark.parametrize("to_disk", [False, True])
def test_latents_that_are_not_finite_are_encoded_again_or_named(tmp_path: Path, to_disk: bool) -> None:
    records = save_images(tmp_path)
    data = Data(records)
    a, c = (float(data.read(index)[0].mean()) for index in (0, 2))
    expected = filled(records, to_disk=False, flip=True)
    found = filled(records, Broken(a), encode_in_fp32=Encoder(), batch_size=2, to_disk=to_disk, flip=True)
    assert found.reencoded == 1 and "1 encoded again" in str(found)
    assert same(found, expected, 4) and same(found, expected, 4, flipped=True)
    for exactly in (None, Broken(a, c)):
        with pytest.raises(UserError) as caught:
            filled(records, Broken(a, c), encode_in_fp32=exactly, batch_size=2, to_disk=to_disk, vae="v3")
        text = str(caught.value)
        assert len(caught.value.mistakes) == 2 and "a.png" in text and "c.png" in text and "not finite" in text
    # the others were done
    assert filled(records, vae="v3").read == (2 if to_disk else 0)


def test_an_encoder_that_gives_nothing_else_stops_early(tmp_path: Path) -> None:
    records = [record(save(tmp_path / f"{number}.png", (64, 64)), (64, 64)) for number in range(40)]
    encoder = Encoder()

    def broken(pixels: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        return encoder(pixels, generators) * float("nan")

    with pytest.raises(UserError):
        filled(records, broken)
    assert len(encoder.batches) < 20


@pytest.mark.parametrize("to_disk", [False, True])
def test_all_images_that_cannot_be_read_are_named_and_the_others_done(tmp_path: Path, to_disk: bool) -> None:
    records = save_images(tmp_path)
    records[0].path.write_bytes(records[0].path.read_bytes()[:200])
    records[2].path.unlink()
    with pytest.raises(UserError) as caught:
        filled(records, to_disk=to_disk, batch_size=2)
    assert len(caught.value.mistakes) == 2
    assert "a.png cannot be decoded" in str(caught.value) and "c.png cannot be read" in str(caught.value)
    if to_disk:
        assert counts(filled([records[1], records[3]])) == (2, 0, 0)


def test_a_image_that_changes_while_it_is_read(tmp_path: Path) -> None:
    records = save_images(tmp_path)

    class Changing(Data):
        changes = 0

        def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
            found = super().read(index)
            if index == 0 and self.changes:
                self.changes -= 1
                noise((64, 64), seed=self.changes).save(self.records[0].path)
                os.utime(self.records[0].path, (1000 + self.changes,) * 2)
            return found

    data = Changing(records)
    data.changes = 2
    assert same(filled(data), filled(records, to_disk=False), 4)  # the last state is what counts
    data.changes = 100
    with pytest.raises(UserError, match=r"a\.png changes while it is being read"):
        filled(data, vae="v2")


@FORMATS
def test_a_file_that_changes_during_the_run_is_noticed(tmp_path: Path, form: str) -> None:
    records = save_images(tmp_path)
    found = filled(records, form=form)
    noise((64, 64), seed=99).save(records[0].path)
    filled(records[:1], form=form)
    assert found.store.get(1, False).latents.shape == (3, 6, 9)
    with pytest.raises(UserError, match="latent cache .*a.* was removed, damaged or changed"):
        found.store.get(0, False)
    for name in entries(tmp_path):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="was removed"):
        found.store.get(1, False)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = save_images(tmp_path)
    filled(records[:2])
    replace_file = os.replace

    def refuse(source: str, target: str) -> None:
        if "c.png" in os.fspath(target):
            raise PermissionError(13, "Permission denied")
        replace_file(source, target)

    monkeypatch.setattr(latent_files.os, "replace", refuse)
    with pytest.raises(
        UserError, match=r"latent cache .*c\.png_64x64_.* cannot be written \(Permission denied\)"
    ) as caught:
        filled(records)
    assert "remove --cache_latents_to_disk" in str(caught.value)
    monkeypatch.undo()
    assert filled(records[:2]).read == 2 and not list(tmp_path.glob("*.dreamfolder-tmp"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "256k") as disk:
        yield disk


@FORMATS
def test_a_full_disk_is_named_and_what_was_written_stays(small_disk: Path, form: str) -> None:
    records = [record(save(small_disk / f"{number:02}.png", (64, 64)), (64, 64)) for number in range(10)]

    def large(pixels: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        return Encoder()(pixels, generators).repeat(1, 12, 1, 1)  # 9 KB an entry

    with pytest.raises(UserError, match=r"latent cache .* cannot be written \(No space left on device\)") as caught:
        filled(records, large, form=form)
    assert "continues from here" in str(caught.value)
    written = entries(small_disk)
    assert written and all(latent_files.read(str(small_disk / name)) is not None for name in written)
    for one in records[len(written) :]:
        one.path.unlink()
    assert counts(filled(records[: len(written)], large, form=form)) == (len(written), 0, 0)


# several processes

PROCESS = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from tests.data.cache.test_latent_cache import Data, Encoder, filled
from tests.data.image_files import record
os.fsync = lambda descriptor: None  # a disk that answers at once: encoding takes no time here, and must not wait
folder, form, number = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
records = [record(path, (64, 64)) for path in sorted(folder.glob("*.png"))]
(folder / f"ready{sys.argv[6]}").touch()
while not (folder / "ready0").exists() or not (folder / "ready1").exists():
    time.sleep(0.001)
me, other = int(sys.argv[6]), 1 - int(sys.argv[6])
calls = 0
def in_turn(pixels, generators):
    # never more than one call ahead of the other process, however the machine shares its time
    global calls
    calls += 1
    (folder / f"call{me} {calls}").touch()
    while not (folder / f"call{other} {calls - 1}").exists() and not (folder / f"call{other} done").exists():
        time.sleep(0.001)
    return Encoder()(pixels, generators)
(folder / f"call{me} 0").touch()
found = filled(records, in_turn, form=form, flip=True, share=(number, int(sys.argv[5])))
(folder / f"call{me} done").touch()
for index in range(len(records)):
    found.store.get(index, True)
print(found.encoded)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "processes"),
    [("npz", 1), ("safetensors", 2)],
    ids=["unaware of each other", "sharing the work"],
)
def test_two_processes_at_once_do_no_harm(tmp_path: Path, form: str, processes: int) -> None:
    records = [record(save(tmp_path / f"{number:02}.png", (64, 64)), (64, 64)) for number in range(40)]
    arguments = [[sys.executable, "-c", PROCESS, str(ROOT), str(tmp_path), form, str(n % processes)] for n in (0, 1)]
    running = [
        subprocess.Popen(
            [*each, str(processes), str(n)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
        )
        for n, each in enumerate(arguments)
    ]
    results = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], results
    made = [int(out) for out, _ in results]
    assert max(made) <= 40 <= sum(made)
    if processes == 2:
        assert min(made) >= 5 and sum(made) <= 60  # each began elsewhere and passed over what the other had done
    found = filled(records, form=form, flip=True)
    assert counts(found) == (40, 0, 0)
    assert same(found, filled(records, to_disk=False, flip=True), 40)
    assert len(entries(tmp_path)) == 40 and not list(tmp_path.glob("*.dreamfolder-tmp"))
