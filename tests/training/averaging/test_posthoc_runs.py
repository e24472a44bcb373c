"""Whole runs with post-hoc EMA: snapshots, resume, and tools/posthoc_ema.py against the average of the saved steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import train_network
from library.training.averaging.power_profiles import exponent
from tests.training.running import World, assert_equal_files, make_world, run
from tools import posthoc_ema

Output = pytest.CaptureFixture[str]
LORA = {"network_module": "networks.lora", "network_dim": 2, "network_train_unet_only": True}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def average(files: list[Path], width: float) -> dict[str, Tensor]:
    """The models after each step, each with its part of the profile, in float64."""
    ends = (torch.arange(len(files) + 1).double() / len(files)) ** (exponent(width) + 1)
    models = [load_file(file) for file in files]
    return {
        name: sum(share * model[name].double() for share, model in zip(ends.diff(), models, strict=True))
        for name in models[0]
    }  # type: ignore[return-value]


def error(made: dict[str, Tensor], direct: dict[str, Tensor], names: list[str]) -> float:
    flat = [torch.cat([tensors[name].double().flatten() for name in names]) for tensors in (made, direct)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def test_an_adapter_resumed_and_any_width_of_it(world: World, tmp_path: Path, capsys: Output) -> None:
    """5 + 3 steps save the snapshots of 8; those of an earlier run go, and those before the resumed step stay."""
    flags = {**LORA, "max_train_steps": 8, "posthoc_ema_snapshots": 4}
    folder = tmp_path / "whole" / "dog-posthoc_ema"
    folder.mkdir(parents=True)
    for name in ("step00000005-0.05.safetensors", "mine.safetensors"):
        (folder / name).write_bytes(b"of an earlier run")
    whole = run(
        world.arguments(tmp_path / "whole", **flags, save_every_n_steps=1, save_state=True),
        capsys,
        train_network.RECIPE,
    )
    assert whole.code == 0, whole.err
    assert f"8 snapshots: {folder}, in place of those of an earlier run" in whole.out
    names = [f"step{step:08d}-{width}.safetensors" for step in range(2, 9, 2) for width in ("0.05", "0.10")]
    assert sorted(path.name for path in folder.iterdir()) == ["mine.safetensors", *names]

    (tmp_path / "rest" / "dog-posthoc_ema").mkdir(parents=True)
    for name in names[:4]:
        (tmp_path / "rest" / "dog-posthoc_ema" / name).write_bytes((folder / name).read_bytes())
    state = tmp_path / "whole" / "dog-step00000005-state"
    rest = run(world.arguments(tmp_path / "rest", **flags, resume=state), capsys, train_network.RECIPE)
    assert rest.code == 0, rest.err
    assert {**whole.losses, **rest.losses} == whole.losses
    for name in names:
        assert_equal_files(folder / name, tmp_path / "rest" / "dog-posthoc_ema" / name)

    files = [tmp_path / "whole" / f"dog-step{step:08d}.safetensors" for step in range(1, 9)]
    snapshot = average(files[:6], 0.1)
    assert error(load_file(folder / names[5]), snapshot, list(snapshot)) < 1e-6
    for width, step in ((0.12, 8), (0.08, 6)):
        words = [str(folder), f"--sigma_rel={width}", f"--step={step}", f"--save_to={tmp_path / 'made.safetensors'}"]
        assert posthoc_ema.main(words) == 0
        assert "reconstruction error of the profile" in capsys.readouterr().out
        made, direct = load_file(tmp_path / "made.safetensors"), average(files[:step], width)
        missed = error(made, direct, list(direct))
        assert missed < 1e-3 and missed < error(load_file(files[step - 1]), direct, list(direct)) / 5
    said, last = metadata(tmp_path / "made.safetensors"), metadata(tmp_path / "whole" / "dog.safetensors")
    assert said.keys() - last.keys() == {f"ss_posthoc_ema_{name}" for name in ("sigma_rel", "steps", "error")}
    assert said["ss_posthoc_ema_sigma_rel"] == "0.08" and said["ss_posthoc_ema_steps"] == said["ss_steps"] == "6"
    assert said["ss_network_dim"] == "2" and said["sshs_model_hash"] != last["sshs_model_hash"]
    resumed = run(
        world.arguments(
            tmp_path, **LORA, max_train_steps=1, network_weights=tmp_path / "made.safetensors", dry_run=True
        ),
        capsys,
        train_network.RECIPE,
    )
    assert resumed.code == 0, resumed.err


def test_a_whole_model_of_any_width(world: World, tmp_path: Path, capsys: Output) -> None:
    """Its frozen parts are those of the model, bit for bit; a .ckpt has snapshots too."""
    flags = {"max_train_steps": 4, "posthoc_ema_snapshots": 4, "learning_rate_te": 0, "save_every_n_steps": 1}
    outcome = run(world.arguments(tmp_path, **flags, use_safetensors=False), capsys)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "dog.ckpt").is_file() and "post-hoc EMA: " in outcome.out
    made = tmp_path / "made.safetensors"
    assert posthoc_ema.main([str(tmp_path / "dog-posthoc_ema"), "--sigma_rel=0.15", f"--save_to={made}"]) == 0
    tensors, start = load_file(made), load_file(world.model)
    trained = [name for name in tensors if name.startswith("model.diffusion_model.")]
    assert all(torch.equal(tensors[name], start[name]) for name in tensors.keys() - set(trained))
    steps = [torch.load(tmp_path / f"dog-step{step:08d}.ckpt", weights_only=True)["state_dict"] for step in range(1, 5)]
    ends = (torch.arange(5).double() / 4) ** (exponent(0.15) + 1)
    direct = {
        name: sum(share * model[name].double() for share, model in zip(ends.diff(), steps, strict=True))
        for name in trained
    }
    assert error(tensors, direct, trained) < 1e-3  # type: ignore[arg-type]
    assert metadata(made)["modelspec.title"] == "dog" and metadata(made)["ss_posthoc_ema_steps"] == "4"


def test_the_plan_counts_averages_and_snapshots(world: World, tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "dog-posthoc_ema").write_text("no folder", encoding="utf-8")
    flags = {"max_train_steps": 20, "posthoc_ema_snapshots": 10, "ema_update_interval": 2, "dry_run": True}
    refused = run(world.arguments(tmp_path, **flags), capsys)
    assert refused.code == 2 and "there is a file with that name" in refused.err
    plan = run(world.arguments(tmp_path, **flags, output_name="cat"), capsys).out
    assert ": 1 model of" in plan and ", 20 snapshots as large" in plan and ", EMA 54.3 MB" in plan
    assert "averages of relative width 0.05 and 0.1, updated every 2 steps, kept in CPU memory, 10 snapshots" in plan
    assert "0.15 (2.2%)" in plan
    assert "ema_update_interval" not in plan.partition("notes")[2]
