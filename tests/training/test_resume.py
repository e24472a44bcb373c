"""N+M steps equal N, save_state, resume, M: losses and final file, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.running import World, assert_equal_files, make_world, run

# 6 + 2 samples in batches of 3, the last of 2: 3 batches, 2 steps an epoch, the second of one batch; step 3 lies in the
# middle of epoch 2, and step 5 in epoch 3. So it does with 8 samples of regularisation in batches of 5, the last of 1.
WINDOWS = {"gradient_accumulation_steps": 2, "max_train_steps": 5}
# Windows of one batch, 3 steps an epoch: step 2 lies in the middle of epoch 1, and step 4 in epoch 2.
BATCHES = {"train_batch_size": 3, "max_train_steps": 4}
CASES = {
    "pixels, every augmentation, regularisation": {
        "flip_aug": True, "color_aug": True, "random_crop": True, "shuffle_caption": True, "reg_data_dir": "reg",
        "train_batch_size": 5, **WINDOWS,
    },
    "latents in memory": {"cache_latents": True, "flip_aug": True, "vae_batch_size": 2},
    "latents on disk, buckets": {
        "cache_latents_to_disk": True, "enable_bucket": True, "min_bucket_reso": 64, "bucket_reso_steps": 8,
        **WINDOWS,
    },
    "workers": {"max_data_loader_n_workers": 2, "flip_aug": True, **WINDOWS},
    "8-bit, cosine, text encoder stops": {
        "optimizer_type": "AdamW8bit", "lr_scheduler": "cosine", "lr_warmup_steps": 2, "stop_text_encoder_training": 3,
        "learning_rate_te": 1e-4,
    },
    "text encoder already stopped": {"stop_text_encoder_training": 1, "caption_dropout_rate": 0.3, "noise_offset": 0.1},
    "bf16 weights, fused": {
        "mixed_precision": "bf16", "full_bf16": True, "min_snr_gamma": 5, "fused_optimizer_groups": 3,
    },
    "rollout": {
        "scheduled_sampling_max_step_offset": 2, "scheduled_sampling_stride": "inference",
        "scheduled_sampling_probability": 0.8, "scheduled_sampling_ramp_steps": 5, "ip_noise_gamma": 0.1,
    },
    "schedule-free": {"optimizer_type": "AdamWScheduleFree"},
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("case", CASES)
def test_resumed_is_uninterrupted(case: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags: dict[str, Any] = {**BATCHES, **CASES[case]}
    if "reg_data_dir" in flags:
        flags["reg_data_dir"] = world.root / "reg"
    last = flags["max_train_steps"]
    whole = run(world.arguments(tmp_path / "whole", **flags, save_every_n_steps=last - 2, save_state=True), capsys)
    assert whole.code == 0, whole.err
    state = tmp_path / "whole" / f"dog-step{last - 2:08d}-state"
    rest = run(world.arguments(tmp_path / "rest", **flags, resume=state), capsys)
    assert rest.code == 0, rest.err
    assert sorted(whole.losses) == list(range(1, last + 1)) and sorted(rest.losses) == [last - 1, last]
    assert rest.losses == {step: whole.losses[step] for step in rest.losses}
    assert_equal_files(tmp_path / "whole" / "dog.safetensors", tmp_path / "rest" / "dog.safetensors")


def test_a_state_of_an_epochs_end_resumes_with_the_next_epoch(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 steps per epoch. A run of 3 epochs resumes with the third; its end resumes if the run is extended."""
    flags = {"train_batch_size": 4, "save_every_n_epochs": 1, "save_state": True}
    whole = run(world.arguments(tmp_path / "whole", **flags, max_train_epochs=4), capsys)
    assert sorted(whole.losses) == [1, 2, 3, 4, 5, 6, 7, 8], whole.err
    state = tmp_path / "whole" / "dog-000002-state"
    rest = run(world.arguments(tmp_path / "rest", **flags, max_train_epochs=3, resume=state), capsys)
    assert rest.code == 0, rest.err
    assert rest.losses == {step: whole.losses[step] for step in (5, 6)}
    assert_equal_files(tmp_path / "whole" / "dog-000003.safetensors", tmp_path / "rest" / "dog.safetensors")
    more = {**flags, "max_train_epochs": 4, "resume": tmp_path / "rest" / "dog-state"}
    last = run(world.arguments(tmp_path / "more", **more), capsys)
    assert last.losses == {step: whole.losses[step] for step in (7, 8)}
    assert_equal_files(tmp_path / "whole" / "dog.safetensors", tmp_path / "more" / "dog.safetensors")


def test_a_state_of_an_epochs_last_step_resumes(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"train_batch_size": 4, "max_train_steps": 3}  # 2 an epoch
    whole = run(world.arguments(tmp_path / "whole", **flags, save_every_n_steps=2, save_state=True), capsys)
    state = tmp_path / "whole" / "dog-step00000002-state"
    rest = run(world.arguments(tmp_path / "rest", **flags, resume=state), capsys)
    assert rest.code == 0, rest.err
    assert rest.losses == {3: whole.losses[3]}
    assert_equal_files(tmp_path / "whole" / "dog.safetensors", tmp_path / "rest" / "dog.safetensors")
