"""What is wrong with images, captions and disks, through the whole command: it is named, and nothing else is lost."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from library.data import retries
from library.training import session
from tests import tiny
from tests.data.image_files import noise
from tests.small_disk import mounted
from tests.training.running import Outcome, World, make_world, run

DISK = {"cache_latents_to_disk": True}


@pytest.fixture(autouse=True)
def no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "DELAYS", ())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "256k") as disk:
        yield disk


def go(world: World, capsys: pytest.CaptureFixture[str], data: Path, **flags: object) -> Outcome:
    """One step on the images in the folder that `data` is in."""
    words = {"train_data_dir": data.parent, "data_cache_dir": world.root / "remembered", "max_train_steps": 1}
    outcome = run(world.arguments(world.root / "out", **{**words, **flags}), capsys)
    assert "Traceback" not in outcome.err
    return outcome


def trained(outcome: Outcome) -> bool:
    return outcome.code == 0 and bool(outcome.losses)


def folder(tmp_path: Path, number: int, kind: str = "png") -> Path:
    """So many images of 64x64."""
    found = tmp_path / "data" / "1_sks dog"
    found.mkdir(parents=True)
    for index in range(number):
        noise((64, 64), index).save(found / f"{index:02d}.{kind}")
    return found


def bomb() -> bytes:
    """A PNG that says it has 30,000 x 30,000 pixels."""
    head = struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(30001))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def break_pixels(path: Path) -> None:
    """Damage that its header does not tell of: it is found when the image is decoded."""
    data = bytearray(path.read_bytes())
    data[200:1500] = bytes(1300)
    path.write_bytes(data)


def add_faults(data: Path) -> list[str]:
    """Add files that are not usable images; returns the words that their messages must contain."""
    (data / "empty.png").write_bytes(b"")
    (data / "bomb.png").write_bytes(bomb())
    (data / "folder.png").mkdir()
    expected = [f"{data / 'empty.png'}", "zero bytes", f"{data / 'bomb.png'}", "--max_image_memory"]
    expected.append("folder.png is a folder")
    whole = data / "cut.jpg"
    noise((64, 64)).save(whole)
    whole.write_bytes(whole.read_bytes()[:-300])
    expected.append(str(whole))
    try:
        (data / "link.png").symlink_to(data / "nowhere.png")
        expected += [f"{data / 'link.png'}", "broken link"]
    except OSError:
        pass  # Windows without the right to make links
    return expected


def test_a_few_bad_files_are_left_out_and_listed(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder(tmp_path, 40)
    expected = add_faults(data)
    outcome = go(world, capsys, data, **DISK)
    assert trained(outcome), outcome.err
    for words in expected:
        assert words in outcome.out, f"{words}\n---\n{outcome.out}"
    assert "40 images x 1 = 40 samples" in outcome.out and "40 encoded" in outcome.err


def test_many_bad_files_end_the_run_before_it_begins(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder(tmp_path, 5)
    expected = add_faults(data)
    outcome = go(world, capsys, data, max_train_steps="many")
    assert outcome.code == 2 and "cannot be used" in outcome.err and "--max_train_steps" in outcome.err
    for words in expected:
        assert words in outcome.err or "folder" in words, f"{words}\n---\n{outcome.err}"


def test_an_image_that_fails_in_caching_is_named_and_the_others_are_kept(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder(tmp_path, 6)
    good = (data / "03.png").read_bytes()
    for name in ("03.png", "05.png"):
        break_pixels(data / name)
    outcome = go(world, capsys, data, **DISK)
    assert outcome.code == 2 and not outcome.losses
    assert all(f"image {data / name} cannot be decoded" in outcome.err for name in ("03.png", "05.png"))
    assert len(list(data.glob("*.safetensors"))) == 4
    (data / "03.png").write_bytes(good)
    (data / "05.png").unlink()
    outcome = go(world, capsys, data, **DISK)
    assert trained(outcome) and "4 read, 1 encoded" in outcome.err


def test_without_a_cache_a_bad_image_is_named_when_it_is_loaded(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder(tmp_path, 3)
    break_pixels(data / "01.png")
    outcome = go(world, capsys, data, max_train_epochs=1)
    assert trained(outcome) and f"sample left out: image {data / '01.png'} cannot be decoded" in outcome.err


def before_caching(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Let something happen after the plan and before images are read."""
    original = session.build_training_set

    def later(*arguments: Any) -> Any:
        happens()
        return original(*arguments)

    monkeypatch.setattr(session, "build_training_set", later)


@pytest.mark.parametrize("cache", [{}, {"cache_latents": True}, DISK], ids=["none", "memory", "disk"])
def test_a_file_that_changes_after_the_plan_is_named(
    cache: dict[str, object],
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One vanishes, one is cut short, one gets another size."""
    data = folder(tmp_path, 6, "jpg")

    def happens() -> None:
        (data / "01.jpg").unlink()
        (data / "03.jpg").write_bytes((data / "03.jpg").read_bytes()[:1000])
        noise((96, 64)).save(data / "04.jpg")

    before_caching(monkeypatch, happens)
    outcome = go(world, capsys, data, **cache, max_train_epochs=1, train_batch_size=1)
    assert outcome.code == 2
    named = [name for name in ("01.jpg", "03.jpg", "04.jpg") if str(data / name) in outcome.err]
    assert named == ["01.jpg", "03.jpg", "04.jpg"] if cache else named
    assert len(list(data.glob("*.safetensors"))) == (3 if cache is DISK else 0)


def test_a_full_disk_is_a_mistake_and_finished_entries_are_kept(
    world: World, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder(small_disk, 6)
    ballast = small_disk / "ballast"
    free = shutil.disk_usage(small_disk).free
    ballast.write_bytes(bytes(free - 3 * 4096))
    outcome = go(world, capsys, data, **DISK)
    assert outcome.code == 2 and not outcome.losses
    assert "latent cache" in outcome.err and "No space left" in outcome.err and "free disk space" in outcome.err
    kept = list(data.glob("*.safetensors"))
    assert 1 <= len(kept) <= 3 and not list(data.glob(".latents-*"))
    ballast.unlink()
    outcome = go(world, capsys, data, **DISK)
    assert trained(outcome) and f"{len(kept)} read, {6 - len(kept)} encoded" in outcome.err


def test_a_folder_that_cannot_be_written_is_a_mistake(
    world: World, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder(small_disk, 3)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    outcome = go(world, capsys, data, **DISK)
    assert outcome.code == 2 and f"latent cache {data}" in outcome.err and "Read-only" in outcome.err
    assert "remove --cache_latents_to_disk" in outcome.err
    assert trained(go(world, capsys, data, cache_latents=True))


def test_an_unwritable_index_does_not_stop_a_run(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file is in the way of the folder: sizes are read again each time; caching captions on disk is refused."""
    data = folder(tmp_path, 3)
    place = tmp_path / "file"
    place.write_bytes(b"")
    outcome = go(world, capsys, data, data_cache_dir=place)
    assert trained(outcome) and f"the index in {place / 'index'} cannot be used" in outcome.out
    outcome = go(world, capsys, data, data_cache_dir=place, cache_text_encoder_outputs_to_disk=True)
    assert outcome.code == 2 and "text cache" in outcome.err and str(place) in outcome.err
    assert trained(go(world, capsys, data, data_cache_dir=place, cache_text_encoder_outputs=True))


NAMES = [
    "犬と猫の写真", "фото собаки", "dog 🐕‍🦺 and 🎉", "it's a dog", "a  dog   with blanks",
    "e\u0301te\u0301 and \u00e9t\u00e9",
    "percent %s {braces} #1 & co; $HOME", "x" * 246, "дог" * 40,
]  # fmt: skip
if os.name != "nt":
    NAMES += ['a "quoted" dog', "back\\slash: <b>dog | *?"]


@pytest.mark.parametrize("cache_format", ["safetensors", "npz"])
def test_names_of_all_kinds_are_trained(
    cache_format: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As names of images with captions, of masks and of folders; the caches find their entries again."""
    data = tmp_path / "фото 写真 🎉" / "1_犬 it's 🐕"
    masks = tmp_path / "マスク"
    for place in (data, masks):
        place.mkdir(parents=True)
        for index, name in enumerate(NAMES):
            noise((64, 64), index).save(place / f"{name}.png")
    for index, name in enumerate(NAMES):
        (data / f"{name}.txt").write_text(f"caption {index} of 犬", encoding="utf-8")
    flags = {
        **DISK, "cache_format": cache_format, "train_batch_size": 4, "masked_loss": True, "output_name": "犬 🐕",
        "conditioning_data_dir": masks, "cache_text_encoder_outputs_to_disk": True, "max_train_epochs": 1,
    }  # fmt: skip
    first = go(world, capsys, data, **flags)
    assert trained(first), first.err
    number = len(NAMES)
    assert f"{number} images x 1 = {number} samples, training, captions from files" in first.out
    assert f"0 read, {number} encoded" in first.err
    again = go(world, capsys, data, **flags)
    assert f"latents: {number} read, 0 encoded" in again.err and f"captions: {number} read, 0 encoded" in again.err
    assert again.losses == first.losses
    assert (world.root / "out" / "犬 🐕.safetensors").is_file()
    shown = go(world, capsys, data, **flags, debug_dataset=True)
    assert shown.code == 0, shown.err


def test_captions_in_other_encodings(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A byte order mark says what a file is; what has none is UTF-8, or what --caption_encoding says."""
    text = "犬、公園、a photo of sks dog"
    data = folder(tmp_path, 4)
    plain = tiny.write_images(tmp_path / "plain" / "1_sks dog", 4)
    for path in plain:
        path.unlink()
    for path in sorted(data.glob("*.png")):
        shutil.copy(path, plain[0].parent)
        (plain[0].parent / path.name).with_suffix(".txt").write_text(text, encoding="utf-8")
    captions = [(data / f"{index:02d}.txt") for index in range(4)]
    for caption, encoding in zip(captions, ("utf-8-sig", "utf-16", "utf-8", "utf-8"), strict=True):
        caption.write_bytes(text.encode(encoding))
    flags = {"max_train_epochs": 1, "train_batch_size": 4}
    expected = go(world, capsys, plain[0].parent, **flags)
    assert go(world, capsys, data, **flags).losses == expected.losses

    for caption in captions[2:]:
        caption.write_bytes(text.encode("shift_jis"))
    refused = go(world, capsys, data, **flags)
    assert refused.code == 2 and not refused.losses
    for caption in captions[2:]:
        assert f"caption file {caption} is not valid UTF-8" in refused.err
    assert "--caption_encoding" in refused.err and str(captions[0]) not in refused.err
    assert go(world, capsys, data, **flags, caption_encoding="shift_jis").losses == expected.losses

    captions[3].write_bytes("un été avec sks dog".encode("latin-1"))
    refused = go(world, capsys, data, **flags, caption_encoding="shift_jis")
    assert refused.code == 2 and f"caption file {captions[3]} is not valid SHIFT_JIS" in refused.err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder(tmp_path, 12)
    (data / "03.png").chmod(0)
    outcome = go(world, capsys, data)
    assert trained(outcome) and str(data / "03.png") in outcome.out
