"""Whole runs of a real recipe on a miniature model: trained modules, saved files and the loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.training.inputs import weights_hash
from tests import tiny
from tests.training.running import World, assert_equal_files, make_world, run

TEXT, UNET, VAE = "cond_stage_model.", "model.diffusion_model.", "first_stage_model."


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def changed(before: Path, after: Path) -> set[str]:
    """The parts of a model that differ between two files."""
    one, other = load_file(before), load_file(after)
    assert one.keys() == other.keys()
    return {name.partition(".")[0] + "." for name in one if not torch.equal(one[name], other[name])} - {"model."} | {
        UNET for name in one if name.startswith(UNET) and not torch.equal(one[name], other[name])
    }


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {UNET, TEXT}),
        ({"stop_text_encoder_training": 0}, {UNET}),
        ({"stop_text_encoder_training": -1}, {UNET}),
        ({"learning_rate_te": 0}, {UNET}),
        ({"stop_text_encoder_training": 1}, {UNET, TEXT}),
    ],
)
def test_which_modules_are_trained(
    flags: dict[str, object], expected: set[str], world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run(world.arguments(tmp_path, max_train_steps=2, **flags), capsys)
    assert outcome.code == 0, outcome.err
    assert changed(world.model, tmp_path / "dog.safetensors") == expected


def test_the_text_encoder_stops_at_its_step(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"max_train_steps": 4, "save_every_n_steps": 1, "stop_text_encoder_training": 2}
    assert run(world.arguments(tmp_path, **flags), capsys).code == 0
    files = [world.model, *(tmp_path / f"dog-step{step:08d}.safetensors" for step in (1, 2, 3, 4))]
    steps = [changed(before, after) for before, after in zip(files, files[1:], strict=False)]
    assert steps == [{UNET, TEXT}, {UNET, TEXT}, {UNET}, {UNET}]


def test_equal_seeds_give_equal_files(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    for name in ("first", "second"):
        assert run(world.arguments(tmp_path / name, max_train_steps=2), capsys).code == 0
    first, second = ((tmp_path / name / "dog.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    assert run(world.arguments(tmp_path / "other", max_train_steps=2, seed=2), capsys).code == 0
    assert changed(tmp_path / "first" / "dog.safetensors", tmp_path / "other" / "dog.safetensors") == {UNET, TEXT}


def test_regularisation_images_count_with_their_weight(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One window holds the whole epoch: its loss is (training losses + weight x regularisation losses) / samples."""
    flags = {
        "reg_data_dir": world.root / "reg",
        "max_train_epochs": 1,
        "train_batch_size": 3,
        "gradient_accumulation_steps": 99,
    }
    losses = [
        run(world.arguments(tmp_path / str(weight), **flags, prior_loss_weight=weight), capsys).losses[1]
        for weight in (0.0, 1.0, 0.25)
    ]
    assert losses[1] > losses[0] > 0
    assert losses[2] == pytest.approx(losses[0] + 0.25 * (losses[1] - losses[0]), rel=1e-6)


def test_training_learns(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(world.arguments(tmp_path, max_train_steps=30, train_batch_size=4, cache_latents=True), capsys)
    losses = [outcome.losses[step] for step in sorted(outcome.losses)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("save_as", ["ckpt", "safetensors", "diffusers", "diffusers_safetensors"])
def test_every_format_can_be_trained_on(
    save_as: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"max_train_steps": 1, "use_safetensors": False, "save_model_as": save_as}
    assert run(world.arguments(tmp_path, **flags), capsys).code == 0
    (made,) = (
        path for path in tmp_path.iterdir() if path.name.startswith("dog") and path.suffix not in (".png", ".jsonl")
    )
    again = {"pretrained_model_name_or_path": made, "max_train_steps": 1, "save_model_as": "safetensors"}
    outcome = run(world.arguments(tmp_path / "again", **again), capsys)
    assert outcome.code == 0, outcome.err
    # the untrained VAE has gone through two saves
    before, after = load_file(world.model), load_file(tmp_path / "again" / "dog.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith(VAE))


def test_sd2_with_v_prediction(tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.write_single_file(tmp_path / "sd2.safetensors", "sd2")
    flags = {
        "pretrained_model_name_or_path": model, "v2": True, "v_parameterization": True, "max_train_steps": 1,
        "no_token_padding": True, "write_inference_yaml": True, "train_batch_size": 3,
    }  # fmt: skip
    outcome = run(world.arguments(tmp_path / "out", **flags), capsys)
    assert outcome.code == 0, outcome.err
    before, after = load_file(model), load_file(tmp_path / "out" / "dog.safetensors")
    assert before.keys() == after.keys()
    spare = [name for name in before if ".resblocks.2." in name or name.endswith(("text_projection", "logit_scale"))]
    assert len(spare) == 14 and all(torch.equal(before[name], after[name]) for name in spare)
    assert 'parameterization: "v"' in (tmp_path / "out" / "dog.yaml").read_text(encoding="utf-8")


def test_half_precision_keeps_frozen_weights_exact(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"max_train_steps": 1, "mixed_precision": "bf16", "cache_latents": True, "stop_text_encoder_training": -1}
    assert run(world.arguments(tmp_path, **flags), capsys).code == 0
    assert changed(world.model, tmp_path / "dog.safetensors") == {UNET}


def test_checkpointed_activations_change_nothing_but_memory(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = []
    for checkpointing in (False, True):
        flags = {"max_train_steps": 2, "gradient_checkpointing": checkpointing, "clip_skip": 2}
        losses.append(run(world.arguments(tmp_path / str(checkpointing), **flags), capsys).losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_cached_latents_on_disk_are_read_again(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"max_train_steps": 2, "cache_latents_to_disk": True, "flip_aug": True}
    first = run(world.arguments(tmp_path / "first", **flags), capsys)
    second = run(world.arguments(tmp_path / "second", **flags), capsys)
    assert "0 read, 5 encoded" in first.err and "5 read, 0 encoded" in second.err
    assert first.losses == second.losses
    assert_equal_files(tmp_path / "first" / "dog.safetensors", tmp_path / "second" / "dog.safetensors")


def test_the_hash_of_a_vae_ignores_its_decoder() -> None:
    vae = tiny.diffusers_modules("sd1").vae
    name = weights_hash(vae, without=("decoder.", "post_quant_conv."))
    with torch.no_grad():
        vae.decoder.conv_in.weight[0, 0, 0, 0] += 1
        assert weights_hash(vae, without=("decoder.", "post_quant_conv.")) == name
        vae.encoder.to(memory_format=torch.channels_last)
        assert weights_hash(vae, without=("decoder.", "post_quant_conv.")) == name
        for tensor in (vae.encoder.conv_in.weight, vae.quant_conv.bias):
            before, tensor[0] = tensor[0].clone(), tensor[0] + 1
            assert weights_hash(vae, without=("decoder.", "post_quant_conv.")) != name
            tensor[0] = before
    assert weights_hash(vae, without=("decoder.", "post_quant_conv.")) == name
