"""A file of latents matches its fingerprint, or is not read."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from library.data.cache import latent_files
from library.data.cache.latent_files import FINGERPRINT, FileHash, Fingerprint, read, shapes, write

FORMATS = pytest.mark.parametrize("name", ["a_sd.safetensors", "a_sd.npz"])
IMAGE = FileHash("11" * 32, (5, 1_700_000_000_123_456_789, 1_700_000_000_987_654_321))
MASK = FileHash("22" * 32, None)


def arrays(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return {
        "latents": rng.standard_normal((4, 3, 5), dtype=np.float32),
        "latents_flipped": rng.standard_normal((4, 3, 5), dtype=np.float32),
        "mask": rng.random((1, 3, 5), dtype=np.float32),
    }


def put(path: Path, seed: int = 0) -> Fingerprint:
    return write(str(path), arrays(seed), "settings", IMAGE, MASK)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the mtimes of the test's files back by a minute."""
    now = time.time_ns
    monkeypatch.setattr(latent_files.time, "time_ns", lambda: now() + 60_000_000_000)


@FORMATS
def test_there_and_back(tmp_path: Path, name: str) -> None:
    fingerprint = put(tmp_path / name)
    found = read(str(tmp_path / name))
    assert (
        found is not None
        and found.fingerprint == fingerprint
        and fingerprint.image == IMAGE
        and fingerprint.mask == MASK
    )
    assert set(found.arrays) == set(arrays())
    assert all(np.array_equal(found.arrays[key], array) for key, array in arrays().items())
    part = read(str(tmp_path / name), {"latents", "no such"})
    assert part is not None and set(part.arrays) == {"latents"} and part.fingerprint == fingerprint
    assert shapes(str(tmp_path / name)) == ({key: array.shape for key, array in arrays().items()}, fingerprint)
    assert os.listdir(tmp_path) == [name]


def test_other_programs_read_both_formats(tmp_path: Path) -> None:
    put(tmp_path / "a_sd.safetensors")
    put(tmp_path / "a_sd.npz")
    ours = safetensors.numpy.load_file(tmp_path / "a_sd.safetensors")
    with np.load(tmp_path / "a_sd.npz", allow_pickle=False) as stored:
        assert set(stored) == {*arrays(), FINGERPRINT}
        for key, array in arrays().items():
            assert np.array_equal(ours[key], array) and np.array_equal(stored[key], array)


@FORMATS
def test_a_file_cut_short_anywhere_is_not_read(tmp_path: Path, name: str) -> None:
    put(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for length in [0, 1, 7, 8, 9, *range(10, len(whole), 61), len(whole) - 1]:
        (tmp_path / name).write_bytes(whole[:length])
        assert read(str(tmp_path / name)) is None, length
        assert shapes(str(tmp_path / name)) is None, length


@FORMATS
def test_a_changed_byte_changes_nothing_or_is_noticed(tmp_path: Path, name: str) -> None:
    fingerprint = put(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    noticed = 0
    for place in range(0, len(whole), 3):
        (tmp_path / name).write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        found = read(str(tmp_path / name))
        if (
            found is None
            or found.fingerprint is None
            or found.fingerprint.key != fingerprint.key
            or set(found.arrays) != set(arrays())
        ):
            noticed += 1
            continue
        assert all(np.array_equal(found.arrays[key], array) for key, array in arrays().items()), place
    assert noticed > len(whole) / 3 / 2  # the rest is padding, times and names that nobody reads


def test_arrays_of_a_program_that_keeps_what_it_does_not_know_are_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "a_sd.npz"
    put(path)
    with np.load(path) as stored:
        kept = dict(stored)
    np.savez(path, **{**kept, "latents": arrays(1)["latents"]})  # as sd-scripts writes into a file that is there
    assert read(str(path)) is None
    np.savez(path, latents=arrays(1)["latents"])
    found = read(str(path))
    assert found is not None and found.fingerprint is None


@pytest.mark.parametrize("content", [b"", b"PK", b"{}", b"\0" * 100, b"\xff" * 5000, (2).to_bytes(8, "little") + b"{}"])
@FORMATS
def test_what_is_no_such_file_is_not_read(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(str(tmp_path / name)) is None and shapes(str(tmp_path / name)) is None
    assert read(str(tmp_path / "gone" / name)) is None
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert read(str(tmp_path / name)) is None and shapes(str(tmp_path / name)) is None


@FORMATS
def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint = put(tmp_path / name)

    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="Input"):
        put(tmp_path / name, seed=1)
    found = read(str(tmp_path / name))
    assert found is not None and found.fingerprint == fingerprint and os.listdir(tmp_path) == [name]


@FORMATS
def test_latents_that_are_not_finite_are_not_written(tmp_path: Path, name: str) -> None:
    arrays = {"latents": np.array([1.0, np.nan], np.float32)}
    with pytest.raises(ValueError, match="latents contains NaN"):
        latent_files.write(str(tmp_path / name), arrays, "s", FileHash("p", None), None)
    assert os.listdir(tmp_path) == []


def test_the_key_is_that_of_the_contents_and_settings() -> None:
    def key(settings: str = "s", image: str = "p", mask: str | None = "m", stamp: Any = None) -> str:
        return Fingerprint(settings, FileHash(image, stamp), mask and FileHash(mask, None) or None, {}).key

    assert key() == key(stamp=(1, 2, 3))
    assert len({key(), key(settings="t"), key(image="q"), key(mask="n"), key(mask=None)}) == 5


@pytest.mark.usefixtures("later")
def test_a_image_is_read_again_when_its_stamp_is_another(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    known = FileHash.of_file(str(path))
    assert known.stamp is not None and known.refreshed(str(path)) is known
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    time.sleep(0.02)  # more than the tick of the file system's clock
    path.write_bytes(b"two")
    os.utime(path, ns=times)  # as copying programs do: same size, same mtime
    assert path.stat().st_mtime_ns == times[1]
    if os.name == "posix":
        assert known.refreshed(str(path)).content != known.content
    path.write_bytes(b"three")
    assert known.refreshed(str(path)).content == FileHash.of_file(str(path)).content != known.content


def test_a_image_that_changed_just_now_gets_no_stamp(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    known = FileHash.of_file(str(path))
    assert known.stamp is None  # it may change once more within one tick
    path.write_bytes(b"two")
    assert known.refreshed(str(path)).content != known.content
    with pytest.raises(OSError):
        FileHash.of_file(str(tmp_path / "gone.png"))


def test_names() -> None:
    assert latent_files.npz_name("cat.jpg", (1024, 768), "_sd.npz") == "cat_1024x0768_sd.npz"
    assert latent_files.npz_name("a.b.png", (64, 64), "_sdxl.npz") == "a.b_0064x0064_sdxl.npz"
    assert latent_files.own_name("cat.jpg", (512, 768), "1f3870be" + "0" * 24, "_sd.npz") == (
        "cat.jpg_512x768_1f3870be_sd.safetensors"
    )
    full = latent_files.full_npz_name("cat.jpg", (1024, 1536), (512, 768), "1f3870be" + "0" * 24, "_sd.npz")
    assert full == "cat.jpg_512x768_1f3870be_1024x1536_sd.npz"


@pytest.mark.parametrize("letter", ["a", "é", "猫", "😀"])
def test_long_names_still_differ_and_fit(tmp_path: Path, letter: str) -> None:
    longest = letter * (250 // len(letter.encode()))
    images = [longest + ".png", longest + ".jpg", longest[:-1] + "b.png"]
    names = [latent_files.own_name(image, (512, 512), "0" * 32, "_sd.npz") for image in images]
    assert len(set(names)) == 3
    for name in names:
        put(tmp_path / name)
        assert read(str(tmp_path / name)) is not None
