"""Metadata of an adapter's file: the keys that other tools read, and values that describe the run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

import train_network
from library.checkpoints.adapter_hashes import adapter_hashes
from library.checkpoints.files import payload_sha256, read_header
from library.options.parse import ADAPTERS, parse
from library.training.adapter.metadata import AdapterMetadata, revision
from library.training.plan.plan import Plan, decide
from tests import tiny
from tests.training.running import World, make_world, run

# As a LoRA that sd-scripts trained on folders, without network_args and --vae, has them.
NAMES = {
    "ss": """
        session_id training_started_at training_finished_at output_name training_comment sd_scripts_commit_hash seed
        steps epoch
        learning_rate text_encoder_lr unet_lr optimizer lr_scheduler lr_warmup_steps max_grad_norm
        gradient_checkpointing gradient_accumulation_steps max_train_steps
        num_train_images num_validation_images num_reg_images num_batches_per_epoch num_epochs
        network_module network_dim network_alpha network_dropout scale_weight_norms
        mixed_precision full_fp16 fp8_base fp8_base_unet lowram cache_latents
        v2 base_model_version clip_skip max_token_length sd_model_name sd_model_hash new_sd_model_hash
        noise_offset noise_offset_random_strength adaptive_noise_scale multires_noise_iterations
        multires_noise_discount ip_noise_gamma ip_noise_gamma_random_strength zero_terminal_snr min_snr_gamma
        debiased_estimation prior_loss_weight loss_type huber_schedule huber_scale huber_c
        caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate face_crop_aug_range
        resize_interpolation
        validation_seed validation_split max_validation_steps validate_every_n_epochs validate_every_n_steps
    """,
    "ss of folders": """
        batch_size_per_device total_batch_size resolution color_aug flip_aug random_crop shuffle_caption enable_bucket
        bucket_no_upscale min_bucket_reso max_bucket_reso keep_tokens
        dataset_dirs reg_dataset_dirs tag_frequency bucket_info
    """,
    "ss of dataset files": "datasets dataset_dirs tag_frequency",
    "modelspec": """
        sai_model_spec architecture implementation implementation_version title resolution date prediction_type
    """,
    "sshs": "model_hash legacy_hash",
}
MINIMUM = {"ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha"}


def names(*groups: str) -> set[str]:
    prefixes = {"modelspec": "modelspec.", "sshs": "sshs_"}
    return {prefixes.get(group, "ss_") + name for group in groups for name in NAMES[group].split()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def adapter_metadata(plan: Plan) -> AdapterMetadata:
    assert plan.adapter is not None
    return AdapterMetadata(plan.facts, plan.optimization, plan.adapter)


def plan_of(world: World, out: Path, **flags: object) -> Plan:
    flags = {"network_module": "networks.lora", "data_cache_dir": out / "cache", **flags}
    return decide(parse(world.arguments(out, **{"use_safetensors": None, **flags}), program=ADAPTERS))


def metadata_of(world: World, out: Path, step: int = 1, **flags: object) -> dict[str, str]:
    return adapter_metadata(plan_of(world, out, **flags)).at(step)


def test_the_93_names_of_a_run_on_folders(world: World, tmp_path: Path) -> None:
    found = metadata_of(world, tmp_path)
    found |= adapter_hashes({"lora_unet_x.alpha": torch.tensor(1.0)}, found)
    assert set(found) == names("ss", "ss of folders", "modelspec", "sshs")
    assert len(found) == 93
    assert all(type(value) is str for value in found.values())


def test_a_dataset_file_has_metadata_for_each_dataset(world: World, tmp_path: Path) -> None:
    file = tmp_path / "data.toml"
    dog = (world.root / "train" / "2_sks dog").as_posix()
    file.write_text(
        f"[[datasets]]\nresolution = [64, 128]\ncaption_extension = '.txt'\n[[datasets.subsets]]\nimage_dir = '{dog}'\n"
        "class_tokens = 'dog'\n",
        encoding="utf-8",
    )
    found = metadata_of(world, tmp_path, train_data_dir=None, resolution=None, dataset_config=file)
    assert set(found) == names("ss", "ss of dataset files", "modelspec")
    assert json.loads(found["ss_datasets"])[0]["resolution"] == [64, 128]
    assert found["modelspec.resolution"] == "64x128"


def test_arguments_and_a_vae_have_keys_of_their_own(world: World, tmp_path: Path) -> None:
    vae = tiny.write_vae_file(tmp_path / "my vae.safetensors")
    flags = {"network_args": ["conv_dim=2", "conv_alpha=1"], "network_dropout": 0.1, "vae": vae}
    found = metadata_of(world, tmp_path, **flags)
    more = {"ss_network_args", "ss_vae_name", "ss_vae_hash", "ss_new_vae_hash"}
    assert set(found) == names("ss", "ss of folders", "modelspec") | more
    assert json.loads(found["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "1", "dropout": 0.1}
    assert found["ss_vae_name"] == "my vae.safetensors"
    assert found["ss_new_vae_hash"] == hashlib.sha256(vae.read_bytes()).hexdigest()
    assert json.loads(metadata_of(world, tmp_path, network_args=["conv_dim=2"])["ss_network_args"])["dropout"] is None


def test_no_metadata_keeps_what_loaders_need(world: World, tmp_path: Path) -> None:
    assert set(metadata_of(world, tmp_path, no_metadata=True)) == MINIMUM | names("modelspec")
    found = metadata_of(world, tmp_path, no_metadata=True, network_args=["conv_dim=2"], training_comment="secret")
    assert set(found) == MINIMUM | {"ss_network_args"} | names("modelspec")


def test_values_describe_the_run(world: World, tmp_path: Path) -> None:
    found = metadata_of(
        world,
        tmp_path,
        step=7,
        train_batch_size=3,
        gradient_accumulation_steps=2,
        max_train_epochs=5,
        reg_data_dir=world.root / "reg",
        network_dim=8,
        network_alpha=4,
        unet_lr=2e-4,
        text_encoder_lr=5e-5,
        optimizer_args=["weight_decay=0.1"],
        lr_scheduler="cosine",
        lr_warmup_steps=0.1,
        min_snr_gamma=5,
        mixed_precision="fp16",
        resolution="64,128",
        seed=None,
    )
    # 8 samples and as many of regularisation; one bucket, so 6 batches, 3 steps an epoch, 15 in all
    expected = {
        "ss_num_train_images": "8",
        "ss_num_reg_images": "8",
        "ss_num_batches_per_epoch": "6",
        "ss_num_epochs": "5",
        "ss_max_train_steps": "15",
        "ss_steps": "7",
        "ss_epoch": "2",
        "ss_batch_size_per_device": "3",
        "ss_total_batch_size": "6",
        "ss_gradient_accumulation_steps": "2",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "8",
        "ss_network_alpha": "4.0",
        "ss_network_dropout": "None",
        "ss_learning_rate": "0.001",
        "ss_unet_lr": "0.0002",
        "ss_text_encoder_lr": "5e-05",
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)",
        "ss_lr_scheduler": "cosine",
        "ss_lr_warmup_steps": "1",
        "ss_min_snr_gamma": "5.0",
        "ss_mixed_precision": "no",  # a CPU does not train in fp16
        "ss_full_fp16": "False",
        "ss_resolution": "(64, 128)",
        "ss_noise_offset": "None",
        "ss_enable_bucket": "False",
        "ss_bucket_info": "null",
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": "sd1.safetensors",
        "ss_new_sd_model_hash": hashlib.sha256(world.model.read_bytes()).hexdigest(),
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "dog",
        "modelspec.resolution": "64x128",
        "modelspec.prediction_type": "epsilon",
    }
    assert {key: found[key] for key in expected} == expected
    assert found["ss_seed"].isdigit()  # the one that was drawn


def test_held_out_images(world: World, tmp_path: Path) -> None:
    found = metadata_of(world, tmp_path, validation_split=0.34, validation_seed=7)
    assert (found["ss_num_validation_images"], found["ss_num_train_images"]) == ("1", "6")
    assert (found["ss_validation_split"], found["ss_validation_seed"]) == ("0.34", "7")


def test_a_rank_from_a_file_is_none(world: World, tmp_path: Path) -> None:
    plan = plan_of(world, tmp_path)
    assert adapter_metadata(plan).at(1)["ss_network_dim"] == "4"  # the default of networks.lora
    adapter = dataclasses.replace(plan.facts.options.adapter, dim_from_weights=True, network_alpha=None)
    options = dataclasses.replace(plan.facts.options, adapter=adapter)
    found = adapter_metadata(dataclasses.replace(plan, facts=dataclasses.replace(plan.facts, options=options))).at(1)
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("None", "None")
    assert metadata_of(world, tmp_path, network_dim=6, network_alpha=0)["ss_network_alpha"] == "6"


def test_untrained_parts_have_a_learning_rate_of_0(world: World, tmp_path: Path) -> None:
    found = metadata_of(world, tmp_path, network_train_unet_only=True)
    assert (found["ss_unet_lr"], found["ss_text_encoder_lr"]) == ("0.001", "0.0")


def test_epochs_are_counted_at_their_end(world: World, tmp_path: Path) -> None:
    """As files of sd-scripts: 0 in the first epoch, 1 at its end, and the number of epochs at the end of the run."""
    metadata = adapter_metadata(plan_of(world, tmp_path, max_train_steps=20))  # 8 steps an epoch
    assert [metadata.at(step)["ss_epoch"] for step in (1, 7, 8, 9, 19, 20)] == ["0", "0", "1", "1", "2", "3"]


@pytest.mark.parametrize(
    ("family", "v", "version", "architecture"),
    [
        ("sd1", True, "sd_v1_v", "stable-diffusion-v1/lora"),
        ("sd2", False, "sd_v2", "stable-diffusion-v2-512/lora"),
        ("sd2", True, "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
    ],
)
def test_model_version_and_architecture(
    family: str, v: bool, version: str, architecture: str, world: World, tmp_path: Path
) -> None:
    folder = tiny.write_diffusers(tmp_path / "a model", family, prediction="v_prediction" if v else "epsilon")
    found = metadata_of(world, tmp_path, pretrained_model_name_or_path=folder, v_parameterization=v)
    assert found["ss_v2"] == str(family == "sd2") and found["ss_base_model_version"] == version
    assert found["modelspec.architecture"] == architecture
    assert found["modelspec.prediction_type"] == ("v" if v else "epsilon")
    assert found["ss_sd_model_name"] == "a model"
    assert found["ss_sd_model_hash"] == found["ss_new_sd_model_hash"] == "IsADirectory"


def test_metadata_flags_and_comment(world: World, tmp_path: Path) -> None:
    flags = {"metadata_title": "Sks", "metadata_author": "me", "training_comment": "zwölf", "clip_skip": 2}
    found = metadata_of(world, tmp_path, **flags, min_timestep=200)
    assert found["modelspec.title"] == "Sks" and found["modelspec.author"] == "me"
    assert found["ss_training_comment"] == "zwölf" and found["ss_output_name"] == "dog"
    assert found["modelspec.encoder_layer"] == found["ss_clip_skip"] == "2"
    assert found["modelspec.timestep_range"] == "200,1000"
    untitled = metadata_of(world, tmp_path, output_name=None)
    assert untitled["modelspec.title"].startswith("LoRA@2") and untitled["ss_output_name"] == "None"


def test_a_name_with_invalid_utf8_can_be_written(world: World, tmp_path: Path) -> None:
    found = metadata_of(world, tmp_path, training_comment="caf\udce9")
    assert found["ss_training_comment"].encode("utf-8") == b"caf?"


def test_equal_runs_give_equal_files_where_the_time_is_fixed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [metadata_of(world, tmp_path)["ss_session_id"] for _ in range(2)]
    assert free[0] != free[1]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    first, again = metadata_of(world, tmp_path), metadata_of(world, tmp_path)
    assert first == again
    assert first["ss_training_started_at"] == first["ss_training_finished_at"] == "1700000000.0"
    assert metadata_of(world, tmp_path, seed=2)["ss_session_id"] != first["ss_session_id"]
    metadata = adapter_metadata(plan_of(world, tmp_path))
    assert metadata.at(1)["ss_session_id"] == metadata.at(2)["ss_session_id"]


def test_files_of_equal_runs_are_equal_byte_by_byte(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    for name in ("first", "again"):
        flags = {"network_module": "networks.lora", "network_dim": 1, "max_train_steps": 1, "use_safetensors": None}
        outcome = run(world.arguments(tmp_path / name, **flags), capsys, train_network.RECIPE)
        assert outcome.code == 0, outcome.err
    first, again = tmp_path / "first" / "dog.safetensors", tmp_path / "again" / "dog.safetensors"
    assert first.read_bytes() == again.read_bytes()
    metadata = read_header(first).metadata
    assert set(metadata) == names("ss", "ss of folders", "modelspec", "sshs")
    assert metadata["sshs_model_hash"] == payload_sha256(first)


def test_a_model_that_was_replaced_in_the_meantime_has_no_hash(world: World, tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    model.write_bytes(world.model.read_bytes())
    metadata = adapter_metadata(plan_of(world, tmp_path, pretrained_model_name_or_path=model))
    os.utime(model, (1, 1))
    assert not {"ss_sd_model_hash", "ss_new_sd_model_hash"} & set(metadata.at(1))


def test_a_thumbnail_is_read_once(world: World, tmp_path: Path) -> None:
    (image,) = tiny.write_images(tmp_path / "thumb", 1)
    metadata = adapter_metadata(plan_of(world, tmp_path, metadata_thumbnail=image))
    image.unlink()
    assert metadata.at(1)["modelspec.thumbnail"].startswith("data:image/png;base64,")


def test_the_commit_of_this_program(tmp_path: Path) -> None:
    assert revision(tmp_path) == "unknown"
    commit, git = "0123456789abcdef" * 2 + "01234567", tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n", encoding="utf-8")
    assert revision(tmp_path) == "unknown"
    (git / "packed-refs").write_text(f"# pack-refs with: peeled\n{commit} refs/heads/main\n", encoding="utf-8")
    assert revision(tmp_path) == commit
    (git / "refs" / "heads" / "main").write_text(commit[::-1] + "\n", encoding="utf-8")
    assert revision(tmp_path) == commit[::-1]
    (git / "HEAD").write_text(commit + "\n", encoding="utf-8")
    assert revision(tmp_path) == commit
    (git / "HEAD").write_text("nonsense", encoding="utf-8")
    assert revision(tmp_path) == "unknown"
