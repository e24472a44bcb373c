"""Masks through the whole command: their effect on the loss, with and without caches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library.data.order import EpochOrder, Sample
from tests import tiny
from tests.training.running import Outcome, World, assert_equal_files, make_world, run

SIZE = (80, 64)  # of the images that have masks; they are cropped to 64x64


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Three images with masks, and a VAE without randomness: what the cache draws for an image, and a batch for a
    sample, comes to the same."""
    world = make_world(tmp_path_factory.mktemp("world"))
    (world.root / "train" / "1_zwx cat").rename(world.root / "cat")
    tiny.write_images(world.root / "reg" / "1_dog", 3, SIZE, seed=9)
    tensors = load_file(world.model)
    tensors["first_stage_model.quant_conv.weight"][4:] = 0
    tensors["first_stage_model.quant_conv.bias"][4:] = -30  # log variance
    save_file(tensors, world.model)
    names = [path.name for path in sorted((world.root / "train" / "2_sks dog").glob("*.png"))]
    for kind, level in (("white", 255), ("black", 0), ("grey", 64)):
        for name in names:
            write_mask(world.root / kind / name, np.full((SIZE[1], SIZE[0]), level))
    for name in names:
        write_mask(world.root / "half" / name, half(name))
        image = Image.open(world.root / "train" / "2_sks dog" / name)
        image.putalpha(Image.open(world.root / "half" / name))
        target = world.root / "transparent" / "2_sks dog" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target)
    return world


def half(name: str) -> np.ndarray:
    """Not equal to its mirror image, and cut by the crop; another one for each image."""
    mask = np.zeros((SIZE[1], SIZE[0]))
    mask[5:41, : 20 + 5 * int(name[-5])] = 255
    mask[41:60, 9:30] = 100
    return mask


def write_mask(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(mask.astype(np.uint8)).save(path)


def train(world: World, capsys: pytest.CaptureFixture[str], out: Path, **flags: object) -> Outcome:
    """Two steps on the three images, six samples in batches of three."""
    words = {"data_cache_dir": world.root / "remembered", "train_batch_size": 3}
    outcome = run(world.arguments(out, **{**words, "max_train_epochs": 1, **flags}), capsys)
    assert outcome.code == 0, outcome.err
    return outcome


def masked(world: World, kind: str) -> dict[str, object]:
    return {"masked_loss": True, "conditioning_data_dir": world.root / kind}


def close(outcome: Outcome, other: Outcome, rel: float = 1e-5) -> bool:
    return outcome.losses == pytest.approx(other.losses, rel=rel) and sorted(outcome.losses) == sorted(other.losses)


def test_masks_without_effect_change_nothing(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """White masks, black ones inverted, a floor of 1: the losses and weights without masks, bit for bit."""
    plain = train(world, capsys, tmp_path / "plain", flip_aug=True)
    assert sorted(plain.losses) == [1, 2] and "masked" not in plain.out
    for name, flags in {
        "white": masked(world, "white"),
        "inverted": {**masked(world, "black"), "mask_invert": True},
        "floor": {**masked(world, "half"), "mask_floor": 1.0},
        "white, normalised": {**masked(world, "white"), "mask_normalise": "sample"},
        "opaque": {"alpha_mask": True},
    }.items():
        outcome = train(world, capsys, tmp_path / name, flip_aug=True, **flags)
        assert outcome.losses == plain.losses, name
        assert_equal_files(tmp_path / name / "dog.safetensors", tmp_path / "plain" / "dog.safetensors")
        assert "masked (" in outcome.out
    assert not close(train(world, capsys, tmp_path / "half", flip_aug=True, **masked(world, "half")), plain, 1e-2)


def test_black_masks_are_refused_before_the_model_is_loaded(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = masked(world, "black")
    outcome = run(world.arguments(tmp_path, **flags, max_train_steps=1, dry_run=True), capsys)
    assert outcome.code == 2 and "nothing would be trained: the masks of all 3 images are black" in outcome.err
    outcome = run(world.arguments(tmp_path, **flags, max_train_steps=1, mask_floor=0.1, dry_run=True), capsys)
    assert outcome.code == 0 and "3 images with a mask: 0% of the area counts, the rest at least 10%" in outcome.out


def test_an_even_mask_weights_and_a_normalised_one_does_not(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """64 of 255 everywhere is a quarter of the loss of the first step; normalised it is all of it."""
    flags = {"max_train_epochs": None, "max_train_steps": 1}
    plain, quarter, whole = (
        train(world, capsys, tmp_path / name, **flags, **more).losses[1]
        for name, more in {
            "plain": {},
            "quarter": masked(world, "grey"),
            "whole": {**masked(world, "grey"), "mask_normalise": "sample"},
        }.items()
    )
    assert quarter == pytest.approx(plain * 64 / 255, rel=1e-6)
    assert whole == pytest.approx(plain, rel=1e-6)


CACHES = {
    "memory": {"cache_latents": True},
    "safetensors": {"cache_latents_to_disk": True},
    "npz": {"cache_latents_to_disk": True, "cache_format": "npz"},
}


@pytest.mark.parametrize("kind", ["files", "alpha"])
def test_masks_in_the_cache_are_those_of_the_images(
    kind: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # at a rate at which Adam's first steps do not magnify the last bits of latents made in other batches
    flags: dict[str, object] = {"flip_aug": True, "vae_batch_size": 2, "learning_rate": 1e-6, "train_batch_size": 6}
    if kind == "files":
        flags |= masked(world, "half")
    else:
        flags |= {"alpha_mask": True, "train_data_dir": world.root / "transparent"}
    plain = train(world, capsys, tmp_path / "plain", **flags)
    for name, cache in CACHES.items():
        made = train(world, capsys, tmp_path / name, **flags, **cache)
        assert close(made, plain), name
        if name != "memory":
            again = train(world, capsys, tmp_path / f"{name} again", **flags, **cache)
            assert "3 read, 0 encoded" in again.err and again.losses == made.losses


def test_transparency_is_the_mask_that_a_file_of_it_would_be(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The images are the same to the model: transparency is laid on white, here in both runs."""
    flags = {"train_data_dir": world.root / "transparent"}
    by_alpha = train(world, capsys, tmp_path / "alpha", **flags, alpha_mask=True)
    by_file = train(world, capsys, tmp_path / "file", **flags, **masked(world, "half"))
    assert by_alpha.losses == by_file.losses
    # where both are there the file counts
    both = train(world, capsys, tmp_path / "both", **flags, alpha_mask=True, **masked(world, "white"))
    neither = train(world, capsys, tmp_path / "neither", **flags)
    assert both.losses == neither.losses != by_alpha.losses


def test_a_step_with_masks_does_not_depend_on_how_its_samples_are_split(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twelve samples of one bucket in one step, with weights for regularisation and timesteps; for a seed that leaves
    batches in their order, so that each sample has the same noise."""
    splits = ((12, 1), (5, 3))
    seed = next(seed for seed in range(1000) if len({order(seed, *split) for split in splits}) == 1)
    flags: dict[str, object] = {
        **masked(world, "half"), "mask_normalise": "sample", "reg_data_dir": world.root / "reg",
        "prior_loss_weight": 0.3, "min_snr_gamma": 5, "resolution": 128, "seed": seed,
        "optimizer_type": "SGDNesterov", "optimizer_args": ["momentum=0.9"], "learning_rate": 1,
    }  # fmt: skip
    before = flat(world.model)
    losses, steps = [], []
    for batch, windows in splits:
        out = tmp_path / str(batch)
        outcome = train(world, capsys, out, **flags, train_batch_size=batch, gradient_accumulation_steps=windows)
        assert list(outcome.losses) == [1]
        losses.append(outcome.losses[1])
        steps.append(flat(out / "dog.safetensors") - before)
    assert losses == pytest.approx([losses[0]] * 2, rel=1e-6)
    # float32 sums in another order
    assert (steps[1] - steps[0]).norm() / steps[0].norm() < 2e-5


def order(seed: int, batch: int, windows: int) -> tuple[Sample, ...]:
    """The samples of the first epoch, one after the other: 3 training images and 3 others, each twice."""
    epochs = EpochOrder([0] * 6, [(128, 128)] * 6, [2] * 6, batch_sizes=[batch], accumulation=windows, seed=seed)
    return tuple(sample for request in epochs.requests(1) for sample in request.samples)


def flat(file: Path) -> torch.Tensor:
    tensors = load_file(file)
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])
