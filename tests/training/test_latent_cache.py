"""Latents cached on disk between runs: only changed entries are encoded again."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.training.running import Outcome, World, make_world, run
from tools import cache_latents


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Two folders with three and two images, masks for the three; a VAE without randomness."""
    world = make_world(tmp_path / "world")
    tensors = load_file(world.model)
    tensors["first_stage_model.quant_conv.weight"][4:] = 0
    tensors["first_stage_model.quant_conv.bias"][4:] = -30  # log variance
    save_file(tensors, world.model)
    tiny.write_images(world.root / "masks", 3, size=(80, 64), seed=5)
    return world


def train(world: World, capsys: pytest.CaptureFixture[str], **flags: object) -> Outcome:
    out = world.root / "out"
    words = {"data_cache_dir": world.root / "remembered", "cache_latents_to_disk": True, "max_train_steps": 1}
    outcome = run(world.arguments(out, **{**words, **flags}), capsys)
    assert outcome.code == 0, outcome.err
    return outcome


def fill(world: World, capsys: pytest.CaptureFixture[str], **flags: object) -> Outcome:
    """What a training with these flags does to the cache before its first step, by the tool that does only this."""
    words = {"data_cache_dir": world.root / "remembered", "output_name": None, **flags}
    arguments = [word for word in world.arguments(world.root, **words) if not word.startswith("--output_dir")]
    capsys.readouterr()
    code = cache_latents.main(arguments)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return Outcome(code, captured.out, captured.err)


def counts(outcome: Outcome) -> tuple[int, int, int]:
    """Latents read, made, and made in place of files that did not fit, as the log says."""
    said = re.findall(r"latents: (\d+) read, (\d+) encoded( \((\d+) of them)?", outcome.out + outcome.err)
    ((read, made, _, stale),) = said
    return int(read), int(made), int(stale or 0)


@pytest.mark.parametrize("cache_format", ["safetensors", "npz"])
def test_only_changed_entries_are_encoded_again(
    cache_format: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both folders have an image_00.png and an image_01.png; the masks are for the names in both."""
    dogs = world.root / "train" / "2_sks dog"
    shutil.rmtree(world.root / "train" / "1_zwx cat")
    tiny.write_images(dogs / "more", 1, size=(80, 64), seed=8)[0].rename(dogs / "other.png")  # without a mask
    (dogs / "more").rmdir()
    flags: dict[str, object] = {
        "masked_loss": True, "conditioning_data_dir": world.root / "masks", "cache_format": cache_format,
    }  # fmt: skip
    first = train(world, capsys, **flags)
    assert counts(first) == (0, 4, 0)
    again = train(world, capsys, **flags)
    assert counts(again) == (4, 0, 0) and again.losses == first.losses
    for path in world.root.glob("train/*/*.png"):
        os.utime(path, (1, 1))
    assert counts(fill(world, capsys, **flags)) == (4, 0, 0), "other times, the same content"

    changed = Image.open(dogs / "image_00.png")
    changed.putpixel((40, 30), (1, 2, 3))
    changed.save(dogs / "image_00.png")
    assert counts(train(world, capsys, **flags)) == (3, 1, 1)
    Image.new("L", (80, 64), 77).save(world.root / "masks" / "image_01.png")
    assert counts(fill(world, capsys, **flags)) == (3, 1, 1)
    assert counts(fill(world, capsys, **flags)) == (4, 0, 0)

    (dogs / "image_02.txt").write_text("a caption is not in the latents", encoding="utf-8")
    assert counts(fill(world, capsys, **flags)) == (4, 0, 0)
    without_masks = {**flags, "masked_loss": False, "conditioning_data_dir": None}
    assert counts(fill(world, capsys, **without_masks))[:2] == (1, 3)


def test_other_vaes_and_resolutions_have_entries_of_their_own(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    vae = tiny.write_vae_file(world.root / "vae.safetensors", seed=7)
    assert counts(fill(world, capsys)) == (0, 5, 0)
    assert counts(fill(world, capsys, vae=vae)) == (0, 5, 0)
    assert counts(fill(world, capsys, resolution="64,128")) == (0, 5, 0)
    assert counts(fill(world, capsys, vae=vae)) == (5, 0, 0)
    assert counts(fill(world, capsys, vae=vae, vae_tiling=True)) == (0, 5, 0), "latents of tiles are others"
    assert counts(fill(world, capsys, vae=vae)) == (5, 0, 0)
    assert counts(fill(world, capsys)) == (5, 0, 0)
    # of a finer decoder alone the latents are the same
    tensors = load_file(world.model)
    tensors["first_stage_model.decoder.conv_in.bias"] += 1
    save_file(tensors, world.model)
    assert counts(fill(world, capsys)) == (5, 0, 0)


@pytest.mark.parametrize("cache_format", ["safetensors", "npz"])
def test_mirror_images_are_added_to_existing_entries(
    cache_format: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = train(world, capsys, cache_format=cache_format)
    files = {path: path.read_bytes() for path in world.root.glob(f"train/*/*.{cache_format}")}
    assert len(files) == 5
    flipped = fill(world, capsys, cache_format=cache_format, flip_aug=True)
    assert counts(flipped) == (0, 5, 0)
    for path, before in files.items():
        after = path.read_bytes()
        assert before != after
    assert counts(fill(world, capsys, cache_format=cache_format, flip_aug=True)) == (5, 0, 0)
    back = train(world, capsys, cache_format=cache_format)
    assert counts(back) == (5, 0, 0) and back.losses == plain.losses


def test_damaged_entries_are_encoded_again(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    first = train(world, capsys)
    files = sorted(world.root.glob("train/*/*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:-10])
    data = bytearray(files[1].read_bytes())
    data[-5] ^= 1
    files[1].write_bytes(data)
    files[2].unlink()
    mended = train(world, capsys)
    assert counts(mended) == (2, 3, 2) and mended.losses == first.losses


def test_npz_of_kohyas_scripts_are_read(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Made here by the rules of those scripts: name with the image's own size, unscaled latents, crop and size."""
    images = tiny.write_images(world.root / "square" / "1_sks dog", 3, seed=6)
    flags: dict[str, object] = {"train_data_dir": world.root / "square", "max_train_epochs": 1}
    flags["learning_rate"] = 1e-6  # Adam's first steps would magnify last bits
    made_by_us = train(world, capsys, **flags, cache_latents=True, cache_latents_to_disk=False)
    vae = tiny.diffusers_modules("sd1").vae
    for path in images:
        pixels = torch.from_numpy(np.asarray(Image.open(path), dtype=np.float32) / 127.5 - 1)
        with torch.no_grad():
            latents = vae.encode(pixels.permute(2, 0, 1)[None]).latent_dist.mean[0].numpy()
        np.savez(
            path.with_name(f"{path.stem}_0064x0064_sd.npz"),
            latents=latents,
            original_size=np.array([64, 64]),
            crop_ltrb=np.array([0, 0, 64, 64]),
        )
    read = train(world, capsys, **flags)
    assert counts(read) == (3, 0, 0) and "3 .npz files of another program used" in read.err
    assert read.losses == pytest.approx(made_by_us.losses, rel=1e-5)
    # of another size of images nothing fits any more: made, and theirs is left as it is
    before = {path: path.read_bytes() for path in world.root.glob("square/*/*.npz")}
    assert counts(fill(world, capsys, **flags, resolution="64,128"))[:2] == (0, 3)
    assert before == {path: path.read_bytes() for path in before}
