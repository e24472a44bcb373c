"""Whole runs that draw: they train as if they did not, and show what they save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_db
import train_network
from library.checkpoints.files import read_header
from library.families.family import TextSettings
from library.families.registry import load_model
from library.sampling.images import sample, sample_batch
from library.sampling.prompts import ImageRequest
from networks import network
from tests import tiny
from tests.training.running import World, assert_equal_files, make_world, run

PROMPTS = "a photo of sks dog --n blurry --w 64 --h 72 --s 3 --d 5 --ss euler_a\na cat --w 64 --h 64 --s 2 --l 1\n"
REQUEST = ImageRequest("a photo of sks dog", "blurry", 64, 72, 5, 3, 7.5, "euler_a")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    new_world = make_world(tmp_path_factory.mktemp("world"))
    (new_world.root / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    return new_world


def stems(out: Path) -> list[str]:
    """Names of the images without time: dog_e000001_00_..._5 and dog_e000001_01_..."""
    names = sorted(path.stem.split("_") for path in (out / "sample").iterdir())
    return ["_".join([*parts[:3], *parts[4:]]) for parts in names]


SCHEDULE_FREE = {"optimizer_type": "AdamWScheduleFree", "learning_rate": 0.01}
# dropouts draw from the global generators, which images must not move
LORA = {
    "network_module": "networks.lora", "network_dropout": 0.3, "network_args": ["module_dropout=0.3", "conv_dim=2"],
    "learning_rate": 0.05, "use_safetensors": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "flags",
    [
        {"stop_text_encoder_training": 1, "gradient_checkpointing": True, "random_crop": True, "color_aug": True},
        {"mixed_precision": "bf16", "cache_latents": True, "cache_text_encoder_outputs": True, "learning_rate_te": 0},
        SCHEDULE_FREE,
        LORA,
        LORA
        | {"cache_text_encoder_outputs": True, "network_train_unet_only": True, "base_precision": "bf16"}
        | {"base_model_precision": "int8"},
    ],
    ids=["all weights", "half, cached", "schedule-free", "adapter", "adapter without text encoder"],
)
def test_drawing_does_not_affect_training(
    flags: dict[str, object], world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = train_network.RECIPE if "network_module" in flags else train_db.RECIPE
    shared = {"max_train_steps": 2, "save_state_on_train_end": True, **flags}
    prompts = {"sample_prompts": world.root / "prompts.txt", "sample_every_n_steps": 1, "sample_at_first": True}
    without = run(world.arguments(tmp_path / "without", **shared), capsys, recipe)
    drawing = run(world.arguments(tmp_path / "with", **shared, **prompts), capsys, recipe)
    assert without.code == drawing.code == 0, without.err + drawing.err
    assert "not drawn" not in drawing.err and "no images" not in drawing.err
    marks = ("000001", "000002", "e000000")
    assert stems(tmp_path / "with") == [f"dog_{mark}_{prompt}" for mark in marks for prompt in ("00_5", "01")]
    assert without.losses == drawing.losses
    assert_equal_files(tmp_path / "without" / "dog.safetensors", tmp_path / "with" / "dog.safetensors")
    one, other = (
        torch.load(tmp_path / name / "dog-state" / "random_states_0.pkl", weights_only=True)
        for name in ("without", "with")
    )
    assert one["random_state"] == other["random_state"]
    assert torch.equal(one["torch_manual_seed"], other["torch_manual_seed"])
    assert torch.equal(one["numpy_random_seed"][1], other["numpy_random_seed"][1])


def model_of(file: Path, base: Path) -> Any:
    """The model of a file, or the base with the adapter of the file."""
    tensors = load_file(file)
    if any(name.startswith("model.diffusion_model.") for name in tensors):
        return load_model(read_header(file))
    model = load_model(read_header(base))
    network.from_tensors(model.modules(), model.family.adapters, tensors).eval().attach()
    return model


@pytest.mark.parametrize("flags", [SCHEDULE_FREE | {"clip_skip": 2}, LORA | {"cache_latents": True}])
def test_an_image_equals_that_of_the_saved_file(
    flags: dict[str, object], world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = train_network.RECIPE if "network_module" in flags else train_db.RECIPE
    drawn = {"sample_prompts": world.root / "prompts.txt", "sample_every_n_steps": 2, "save_every_n_steps": 2}
    assert run(world.arguments(tmp_path, max_train_steps=3, **drawn, **flags), capsys, recipe).code == 0
    (path,) = (tmp_path / "sample").glob("dog_000002_00_*_5.png")
    settings = TextSettings(clip_skip=2 if "clip_skip" in flags else None)
    with torch.no_grad():
        saved = np.asarray(
            sample(model_of(tmp_path / "dog-step00000002.safetensors", world.model), REQUEST, 5, settings=settings)
        ).astype(int)
        before = np.asarray(sample(load_model(read_header(world.model)), REQUEST, 5, settings=settings)).astype(int)
    with Image.open(path) as image:
        shown = np.asarray(image).astype(int)
    assert np.abs(shown - saved).max() <= 1  # the sums of a decoder in another memory layout
    assert np.abs(shown - before).max() > 1


def test_a_refiner_refines_the_images_of_the_dataset(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompt 1 refines image 1: the latents that a cache holds of it, noised to timestep 101 of ten steps. They are
    the same where none is made."""
    model = tiny.write_single_file(tmp_path / "refiner.safetensors", "refiner")
    images = tiny.write_images(tmp_path / "train" / "1_dog", 2, size=(64, 80))
    (tmp_path / "p.txt").write_text("a\na cat --n blurry --s 10 --d 5 --w 512\n", encoding="utf-8")
    flags = {
        "pretrained_model_name_or_path": model, "train_data_dir": tmp_path / "train", "resolution": "64,80",
        "sample_prompts": tmp_path / "p.txt", "sample_at_first": True, "max_train_steps": 1, "network_dim": 1,
        "network_module": "networks.lora", "validation_preview_steps": 1,
    }  # fmt: skip
    drawn = []
    for cached in ({}, {"cache_latents": True, "cache_latents_to_disk": True}):
        done = run(world.arguments(tmp_path / f"out{len(drawn)}", **flags, **cached), capsys, train_network.RECIPE)
        assert done.code == 0 and "not drawn" not in done.err, done.err
        (path,) = (tmp_path / f"out{len(drawn)}" / "sample").glob("dog_e000000_01_*_5.png")
        with Image.open(path) as image:
            drawn.append(np.asarray(image).astype(int))
        pictures = sorted(each.stem.rpartition("_")[2] for each in (path.parent / "so_far").glob("dog_e000000_01_*"))
        assert pictures == ["01of02"]  # of the two steps that refine
    (file,) = images[1].parent.glob(f"{images[1].name}*.safetensors")
    request, start = ImageRequest("a cat", "blurry", steps=10), load_file(file)["latents"]
    (expected,) = sample_batch(load_model(read_header(model)), [request], [5], init_latents=[start], strength=0.2)
    assert all(np.abs(each - np.asarray(expected).astype(int)).max() <= 1 for each in drawn)


def test_epochs(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An epoch has four steps: the second one is cut short, and shown all the same."""
    drawn = {"sample_prompts": world.root / "prompts.txt", "sample_every_n_epochs": 1, "train_batch_size": 2}
    assert run(world.arguments(tmp_path, max_train_steps=5, **drawn), capsys).code == 0
    assert [stem for stem in stems(tmp_path) if stem.endswith("5")] == ["dog_e000001_00_5", "dog_e000002_00_5"]


def test_tensorboard_shows_them(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    drawn = {"sample_prompts": world.root / "prompts.txt", "sample_every_n_steps": 1, "logging_dir": tmp_path / "logs"}
    assert run(world.arguments(tmp_path / "out", max_train_steps=2, **drawn), capsys).code == 0
    (events,) = (tmp_path / "logs").rglob("events.out.*")
    found = EventAccumulator(str(events.parent), {"images": 0}).Reload()
    assert found.Tags()["images"] == ["sample/00", "sample/01"]
    shown = found.Images("sample/00")
    assert [(each.step, each.width, each.height) for each in shown] == [(1, 64, 72), (2, 64, 72)]


def test_missing_prompts_end_the_plan_only_where_they_are_drawn(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = {"sample_prompts": tmp_path / "gone.txt", "max_train_steps": 1}
    refused = run(world.arguments(tmp_path, **gone, sample_every_n_epochs=1), capsys)
    assert refused.code == 2 and "gone.txt cannot be read" in refused.err
    plain = run(world.arguments(tmp_path, **gone), capsys)
    assert plain.code == 0 and "gone.txt" not in plain.err and not (tmp_path / "sample").exists()
