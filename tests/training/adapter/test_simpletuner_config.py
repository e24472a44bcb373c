"""A run that SimpleTuner's two files describe is the run of the same options as flags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import train_network
from tests import tiny
from tests.training.running import assert_equal_files, run

BACKEND = {
    "id": "dog",
    "type": "local",
    "instance_data_dir": "images",
    "caption_strategy": "instanceprompt",
    "instance_prompt": "sks dog",
    "resolution": 64,
    "crop": True,
    "crop_style": "center",
    "minimum_image_size": 32,
}
CONFIG = {
    "--model_type": "lora",
    "--model_family": "sd1x",
    "--pretrained_model_name_or_path": "sd1.safetensors",
    "--data_backend_config": "multidatabackend.json",
    "--output_dir": "json",
    "--lora_rank": "2",
    "--lora_alpha": 2,
    "--train_text_encoder": "false",
    "--optimizer": "adamw_bf16",
    "--learning_rate": "1e-3",
    "--lr_scheduler": "polynomial",
    "--lr_warmup_steps": 1,
    "--max_train_steps": 3,
    "--num_train_epochs": 0,
    "--train_batch_size": 2,
    "--gradient_checkpointing": "true",
    "--mixed_precision": "no",
    "--snr_gamma": 5,
    "--seed": 42,
    "--use_ema": True,
    "--ema_decay": 0.5,
    "scheduled_sampling_max_step_offset": 2,
    "scheduled_sampling_probability": 1.0,
    "scheduled_sampling_ramp_steps": 2,
    "scheduled_sampling_sampler": "unipc",
    "--caption_dropout_probability": 0.1,
    "--validation_prompt": "a photo of sks dog",
    "--push_to_hub": "false",
    "max_data_loader_n_workers": 0,
}
FLAGS = (
    "--network_module networks.lora --pretrained_model_name_or_path sd1.safetensors "
    "--data_backend_config multidatabackend.json --output_dir flags --network_dim 2 --network_alpha 2 "
    "--network_train_unet_only --optimizer_type AdamW --optimizer_args weight_decay=0.01 eps=1e-6 "
    "--learning_rate 1e-3 --lr_scheduler polynomial --lr_scheduler_args lr_end=4e-7 --lr_warmup_steps 1 "
    "--max_train_steps 3 --train_batch_size 2 --gradient_checkpointing --min_snr_gamma 5 --seed 42 --use_ema "
    "--scheduled_sampling_max_step_offset 2 --scheduled_sampling_probability 1 --scheduled_sampling_ramp_steps 2 "
    "--scheduled_sampling_sampler unipc --ema_decay 0.5 --caption_dropout_rate 0.1 --max_data_loader_n_workers 0"
).split()


def test_a_run_by_the_file_is_the_run_by_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_single_file(tmp_path / "sd1.safetensors", "sd1")
    tiny.write_images(tmp_path / "images", 3, size=(80, 64))
    (tmp_path / "multidatabackend.json").write_text(json.dumps([BACKEND]), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    by_file = run(["--config_file", "config"], capsys, train_network.RECIPE)
    by_flags = run(FLAGS, capsys, train_network.RECIPE)
    assert by_file.code == by_flags.code == 0, by_file.err
    assert by_file.losses == by_flags.losses and len(by_file.losses) == 3
    for name in ("last.safetensors", "last_ema.safetensors"):
        assert_equal_files(tmp_path / "json" / name, tmp_path / "flags" / name)
