"""Whole runs with a moving average: files, previews, validation, resume, and the weights in training as without it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import train_network
from tests.training.running import World, assert_equal_files, make_world, run

Output = pytest.CaptureFixture[str]
LORA = {"network_module": "networks.lora", "network_dim": 2, "network_train_unet_only": True}
EMA = {"use_ema": True, "ema_decay": 0.8, "ema_update_interval": 2, "ema_warmup_steps": 1}


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def test_a_model_with_its_average_resumed_and_alone(world: World, tmp_path: Path, capsys: Output) -> None:
    """The weights in training are those of a run without an average; 3 + 2 steps are 5; the average is its recursion
    over the models saved after each step, with the first update after step 2."""
    flags = {"max_train_steps": 5, "stop_text_encoder_training": 2}
    plain = run(world.arguments(tmp_path / "plain", **flags), capsys)
    assert plain.code == 0, plain.err
    whole = run(
        world.arguments(tmp_path / "whole", **flags, **EMA, save_every_n_steps=1, save_last_n_steps=4, save_state=True),
        capsys,
    )
    assert whole.code == 0, whole.err
    assert whole.losses == plain.losses
    assert_equal_files(tmp_path / "plain" / "dog.safetensors", tmp_path / "whole" / "dog.safetensors")

    state = tmp_path / "whole" / "dog-step00000003-state"
    rest = run(world.arguments(tmp_path / "rest", **flags, **EMA, resume=state, ema_save="only"), capsys)
    assert rest.code == 0, rest.err
    assert_equal_files(tmp_path / "whole" / "dog_ema.safetensors", tmp_path / "rest" / "dog_ema.safetensors")
    assert not (tmp_path / "rest" / "dog.safetensors").exists()

    said = metadata(tmp_path / "rest" / "dog_ema.safetensors")
    assert {key: value for key, value in said.items() if key.startswith("ss_")} == {
        "ss_ema_of": "weights", "ss_ema_decay": "0.8", "ss_ema_update_interval": "2", "ss_ema_warmup_steps": "1",
        "ss_ema_steps": "5",
    }  # fmt: skip
    assert said["modelspec.title"] == "dog"
    assert not any("ema" in key for key in metadata(tmp_path / "whole" / "dog.safetensors"))

    at = {step: load_file(tmp_path / "whole" / f"dog-step{step:08d}.safetensors") for step in (2, 4)}
    ema = load_file(tmp_path / "whole" / "dog_ema.safetensors")
    first, start = load_file(tmp_path / "whole" / "dog-step00000001_ema.safetensors"), load_file(world.model)
    assert all(torch.equal(first[name], start[name]) for name in start)
    for name, value in ema.items():
        if not value.is_floating_point():
            continue
        expected = start[name].double()
        for step, factor in ((2, (2 / 11) ** 2), (4, (4 / 13) ** 2)):
            expected = factor * expected + (1 - factor) * at[step][name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)


def test_files_previews_and_validation_of_an_adapter(world: World, tmp_path: Path, capsys: Output) -> None:
    """Old files of both versions are removed together; with `only` and `none` there is one file."""
    flags = {
        **LORA, "use_ema": True, "max_train_steps": 4, "save_every_n_steps": 1, "save_last_n_steps": 1,
        "validation_split": 0.4, "validate_every_n_steps": 4, "sample_prompts": "a dog --w 64 --h 64 --s 1",
        "sample_every_n_steps": 4,
    }  # fmt: skip
    both = run(world.arguments(tmp_path / "both", **flags), capsys, train_network.RECIPE)
    assert both.code == 0, both.err
    assert sorted(path.name for path in (tmp_path / "both").glob("*.safetensors")) == [
        *(f"dog-step0000000{step}{suffix}.safetensors" for step in (3, 4) for suffix in ("", "_ema")),
        "dog.safetensors",
        "dog_ema.safetensors",
    ]
    images = [path.stem for path in (tmp_path / "both" / "sample").iterdir()]
    assert len(images) == 2 and sum(name.endswith("_ema") for name in images) == 1
    assert both.err.count(": validation loss") == 3 and "step 4 with the EMA: validation loss" in both.err
    assert "EMA of the trained weights: decay 0.285714, mean age 0.4 steps" in both.out
    steps = [metadata(path)["ss_ema_steps"] for path in sorted((tmp_path / "both").glob("*_ema.safetensors"))]
    assert steps == ["3", "4", "4"]
    assert not any("ss_ema" in key for key in metadata(tmp_path / "both" / "dog.safetensors"))
    short = {**LORA, "use_ema": True, "max_train_steps": 1, "ema_validation": "none", "no_metadata": True}
    for what, expected in (("only", "dog_ema.safetensors"), ("none", "dog.safetensors")):
        outcome = run(world.arguments(tmp_path / what, **short, ema_save=what), capsys, train_network.RECIPE)
        assert outcome.code == 0, outcome.err
        assert [path.name for path in (tmp_path / what).glob("*.safetensors")] == [expected]
        assert ("ss_ema_steps" in metadata(tmp_path / what / expected)) == (what == "only")


def test_bf16_weights_resume_with_their_average(world: World, tmp_path: Path, capsys: Output) -> None:
    flags = {"max_train_steps": 2, "use_ema": True, "mixed_precision": "bf16", "full_bf16": True, "ema_save": "only"}
    whole = run(world.arguments(tmp_path / "whole", **flags, save_every_n_steps=1, save_state=True), capsys)
    assert whole.code == 0, whole.err
    state = tmp_path / "whole" / "dog-step00000001-state"
    shadows = torch.load(state / "ema.bin", weights_only=True)["shadows"]
    assert {shadow.dtype for shadow in shadows} == {torch.float32}
    rest = run(world.arguments(tmp_path / "rest", **flags, resume=state), capsys)
    assert rest.code == 0, rest.err
    assert_equal_files(tmp_path / "whole" / "dog_ema.safetensors", tmp_path / "rest" / "dog_ema.safetensors")
    other = run(world.arguments(tmp_path / "other", **flags, resume=state, ema_decay=0.5), capsys)
    assert other.code == 2 and "--ema_decay was None when the state was saved and is 0.5 now" in other.err


def test_the_plan_counts_the_average(world: World, tmp_path: Path, capsys: Output) -> None:
    """4 bytes for each trained parameter in memory, and as many files more."""
    flags = {"max_train_steps": 4, "save_every_n_steps": 2, "dry_run": True}
    plain = run(world.arguments(tmp_path, **flags), capsys).out
    averaged = run(world.arguments(tmp_path, **flags, use_ema=True), capsys).out
    assert "disk: up to" in plain and ": 3 models of" in plain and ": 6 models of" in averaged
    assert ", EMA " not in plain and ", EMA " in averaged
    assert f"{tmp_path / 'dog.safetensors'}\n" in averaged and f"{tmp_path / 'dog_ema.safetensors'}\n" in averaged


def test_settings_without_an_average_are_noted(world: World, tmp_path: Path, capsys: Output) -> None:
    outcome = run(world.arguments(tmp_path, dry_run=True, ema_decay=0.9), capsys)
    assert outcome.code == 0 and "ema_decay" in outcome.out and "use_ema is not set" in outcome.out
    both = run(world.arguments(tmp_path, dry_run=True, use_ema=True, ema_decay=0.9, ema_horizon=3), capsys)
    assert both.code == 2 and "a horizon is turned into a decay" in both.err


def test_the_average_of_delta_w_resumed(world: World, tmp_path: Path, capsys: Output) -> None:
    """With DoRA, drawn and validated: 2 + 1 steps are 3; its ΔW is the best of the rank for the average of those of the
    steps."""
    flags = {
        **LORA, "network_args": ["use_dora=True"], "learning_rate": 1e-2, "use_ema": True,
        "ema_of": "delta", "ema_decay": 0.9, "max_train_steps": 3, "ema_validation": "ema_only",
    }  # fmt: skip
    seen = {
        "validation_split": 0.4, "validate_every_n_steps": 3, "sample_prompts": "a dog --w 64 --h 64 --s 1",
        "sample_every_n_steps": 3, "save_every_n_steps": 1, "save_state": True,
    }  # fmt: skip
    whole = run(world.arguments(tmp_path / "whole", **flags, **seen), capsys, train_network.RECIPE)
    assert whole.code == 0, whole.err
    assert "EMA of ΔW, decomposed where it is used: decay 0.9" in whole.out
    assert "with the EMA: validation loss" in whole.err and len(list((tmp_path / "whole" / "sample").iterdir())) == 1
    state = tmp_path / "whole" / "dog-step00000002-state"
    flags |= {name: seen[name] for name in ("validation_split",)}
    rest = run(world.arguments(tmp_path / "rest", **flags, resume=state), capsys, train_network.RECIPE)
    assert rest.code == 0, rest.err
    made = tmp_path / "whole" / "dog_ema.safetensors"
    assert_equal_files(made, tmp_path / "rest" / "dog_ema.safetensors")

    at = {step: load_file(tmp_path / "whole" / f"dog-step{step:08d}.safetensors") for step in (1, 2, 3)}
    ema, said = load_file(made), metadata(made)
    decays = {step: (1 + step) / (10 + step) for step in at}
    lost = total = 0.0
    for name in (key.removesuffix(".alpha") for key in ema if key.endswith(".alpha")):
        average = 0 * product(at[1], name)
        for step, factor in decays.items():
            average = factor * average + (1 - factor) * product(at[step], name)
        u, values, vh = torch.linalg.svd(average)
        torch.testing.assert_close(product(ema, name), (u[:, :2] * values[:2]) @ vh[:2], rtol=1e-3, atol=1e-6)
        lost, total = lost + float((values[2:] ** 2).sum()), total + float((values**2).sum())
    assert said["ss_ema_of"] == "delta" and float(said["ss_ema_left_out"]) == pytest.approx(lost / total, rel=0.02)
    scales = [name for name in ema if name.endswith("dora_scale")]
    assert scales and f"leaves out {lost / total:.2%} of its energy" in whole.err


def product(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    up, down = (tensors[f"{name}.lora_{side}.weight"].double().flatten(1) for side in ("up", "down"))
    return up @ down


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("networks.lora_fa", "lora_down is frozen, so the average of the weights is that of ΔW"),
        ("networks.loha", "the singular values of ΔW give no Hadamard product"),
        ("lycoris.kohya", "only the module itself knows"),
    ],
)
def test_kinds_without_an_average_of_delta_w(
    world: World, tmp_path: Path, capsys: Output, module: str, message: str
) -> None:
    flags = {"network_module": module, "use_ema": True, "ema_of": "delta", "dry_run": True}
    refused = run(world.arguments(tmp_path, **flags), capsys, train_network.RECIPE)
    assert refused.code == 2 and f"--ema_of delta with --network_module {module}: {message}" in refused.err


def test_the_plan_counts_whole_matrices(world: World, tmp_path: Path, capsys: Output) -> None:
    """4 bytes for each weight of the adapted layers, here of the U-Net's 192."""
    flags = {**LORA, "use_ema": True, "ema_of": "delta", "max_train_steps": 1}
    outcome = run(world.arguments(tmp_path, **flags), capsys, train_network.RECIPE)
    assert outcome.code == 0, outcome.err
    counted = re.search(r"\bEMA ([\d.]+ \w+)", outcome.out)
    assert counted is not None, outcome.out
    assert f"EMA of ΔW, decomposed where it is used: {counted[1]} in CPU memory" in outcome.err
    whole = run(world.arguments(tmp_path, use_ema=True, ema_of="delta", dry_run=True), capsys)
    assert whole.code == 2 and "ema_of" in whole.err and "train_network.py" in whole.err
