"""Training from shards is training from the folder: the same records, in the same order, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from library.data import retries
from tests.training import running
from tests.training.running import World, assert_equal_files, run
from tools import make_shards


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Folders of images with masks and transparency, and the same in shards of a few images each."""
    world = running.make_world(tmp_path_factory.mktemp("shards"))
    folder = world.root / "train" / "2_sks dog"
    Image.new("RGBA", (64, 96), (200, 30, 30, 90)).save(folder / "clear.png")
    (folder / "clear.txt").write_text("a see-through dog\nnot used", encoding="utf-8")
    (folder / "own.png").write_bytes((folder / "image_00.png").read_bytes())
    (world.root / "masks").mkdir()
    for name in ("clear.png", "own.png"):
        with Image.open(folder / name) as image:
            Image.linear_gradient("L").resize(image.size).save(world.root / "masks" / name)
    for kind in ("train", "reg"):
        words = ["--input_dir", world.root / kind, "--output_dir", world.root / "packed" / kind, "--shard_size", 0.03]
        words += ["--conditioning_data_dir", world.root / "masks"] if kind == "train" else []
        assert make_shards.main([*map(str, words)]) == 0
    return world


def both(world: World, out: Path, **flags: object) -> tuple[list[str], list[str]]:
    """The command line for the folders, and that for the shards."""
    common = {"masked_loss": True, "enable_bucket": True, "min_bucket_reso": 64, "bucket_reso_steps": 32, **flags}
    packed = world.root / "packed"
    shards = {"train_data_dir": packed / "train", "reg_data_dir": packed / "reg", "conditioning_data_dir": packed}
    folders = {"reg_data_dir": world.root / "reg", "conditioning_data_dir": world.root / "masks"}
    return (
        world.arguments(out / "folders", data_cache_dir=out / "a", **folders, **common),
        world.arguments(out / "shards", data_cache_dir=out / "b", **{**common, **shards}),
    )


def test_training_from_shards_is_training_from_the_folders_and_resumes(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {
        "flip_aug": True,
        "random_crop": True,
        "train_batch_size": 2,
        "max_train_steps": 8,
        "prior_loss_weight": 0.5,
    }
    folders, shards = both(world, tmp_path, **flags)
    expected = run(folders, capsys)
    assert expected.code == 0, expected.err
    found = run([*shards, "--save_state", "--save_every_n_steps=3"], capsys)
    assert found.code == 0, found.err
    assert found.losses == expected.losses
    assert_equal_files(tmp_path / "folders" / "dog.safetensors", tmp_path / "shards" / "dog.safetensors")
    state = next(path for path in (tmp_path / "shards").iterdir() if path.is_dir() and "00000003" in path.name)
    (_, again) = both(world, tmp_path / "again", **flags)
    resumed = run([*again, f"--resume={state}"], capsys)
    assert resumed.code == 0, resumed.err
    assert resumed.losses == {step: loss for step, loss in expected.losses.items() if step > 3}
    assert_equal_files(tmp_path / "again" / "shards" / "dog.safetensors", tmp_path / "folders" / "dog.safetensors")


def test_latents_of_shards_are_cached_like_those_of_files(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"cache_latents_to_disk": True, "alpha_mask": True, "max_train_steps": 3, "max_data_loader_n_workers": 1}
    folders, shards = both(world, tmp_path, **flags)
    expected = run(folders, capsys)
    assert expected.code == 0, expected.err
    first = run(shards, capsys)
    assert first.code == 0, first.err
    assert first.losses == expected.losses
    second = run([*shards, "--seed=1"], capsys)
    assert " read, 0 encoded" in second.out + second.err, second.out + second.err
    assert second.losses == expected.losses
    assert not list((world.root / "packed").rglob("*.safetensors")), "caches are not beside the shards"


def test_an_image_whose_bytes_changed_is_left_out_and_named(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "DELAYS", (0.0,))
    shutil.copytree(world.root / "packed" / "train", tmp_path / "train")
    (shard,) = (tmp_path / "train" / "2_sks dog").glob("*.tar")
    own = (world.root / "train" / "2_sks dog" / "own.png").read_bytes()
    data = shard.read_bytes()
    assert data.count(own) == 2  # image_00.png is the same picture
    place = data.rindex(own) + len(own) // 2
    shard.write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])
    _, words = both(world, tmp_path / "out", max_train_steps=12, train_batch_size=2, max_data_loader_n_workers=1)
    outcome = run([*words, f"--train_data_dir={tmp_path / 'train'}"], capsys)
    said = outcome.out + outcome.err
    assert outcome.code == 0, said
    assert f"{shard}/own.png" in said and "the shard was changed" in said and "sample left out" in said
    assert "of 1 image" in said  # all others were read
