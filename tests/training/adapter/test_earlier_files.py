"""Adapters and training states of earlier versions: DoRA's magnitudes were per output, OFT's names began with oft."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_network
from tests.training.running import Outcome, World, assert_equal_files, make_world, run

COMMON = {
    "network_module": "networks.lora",
    "network_dim": 2,
    "train_batch_size": 3,
    "max_train_steps": 3,
    "learning_rate": 1e-2,
    "network_train_unet_only": True,
    "use_safetensors": None,
}
DORA = {"network_args": ["use_dora=True"]}
BY_OUTPUT = {"network_args": ["use_dora=True", "wd_on_output=True"]}
OFT = {"network_module": "networks.oft", "network_alpha": 1e-4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def train(world: World, out: Path, capsys: pytest.CaptureFixture[str], **flags: object) -> Outcome:
    outcome = run(world.arguments(out, **{**COMMON, **flags}), capsys, train_network.RECIPE)
    assert outcome.code == 0, outcome.err
    return outcome


def earlier(state: Path, identity: Mapping[str, str] = MappingProxyType({})) -> Path:
    """The state as an earlier version wrote it: without checksums, and with this `identity`."""
    head = json.loads((state / "train_state.json").read_text(encoding="utf-8"))
    head["identity"] |= identity
    del head["files"], head["head_crc32"]
    (state / "train_state.json").write_text(json.dumps(head), encoding="utf-8")
    return state


def shapes(file: Path) -> set[tuple[int, ...]]:
    """The shapes of the magnitudes of the attention layers, without 1."""
    return {tuple(value.shape) for key, value in load_file(file).items() if key.endswith("attn1_to_q.dora_scale")}


def test_a_dora_per_output_is_resumed(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train(world, tmp_path / "whole", capsys, **BY_OUTPUT, save_every_n_steps=2, save_state=True)
    state = earlier(tmp_path / "whole" / "dog-step00000002-state", {"--network_args": str(("use_dora=True",))})
    rest = train(world, tmp_path / "rest", capsys, **DORA, resume=state)
    assert "DoRA: magnitudes per output, as in" in rest.out
    assert rest.losses == {3: whole.losses[3]}
    first, second = (load_file(tmp_path / run / "dog.safetensors") for run in ("whole", "rest"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_dora_per_output_is_trained_on(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(world, tmp_path / "old", capsys, **BY_OUTPUT, max_train_steps=1)
    train(world, tmp_path / "new", capsys, **DORA, max_train_steps=1)
    old, new = (tmp_path / name / "dog.safetensors" for name in ("old", "new"))
    assert all(shape[1] == 1 for shape in shapes(old)) and all(shape[0] == 1 for shape in shapes(new))
    still: dict[str, Any] = {"learning_rate": 1e-20, "max_train_steps": 1}
    for file, flags in ((old, DORA), (new, BY_OUTPUT)):
        for dims in ({}, {"network_dim": None, "dim_from_weights": True}):
            train(world, tmp_path / "again", capsys, **flags, **still, **dims, network_weights=file)
            first, second = load_file(file), load_file(tmp_path / "again" / "dog.safetensors")
            assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_an_oft_under_its_old_names_is_resumed(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(world, tmp_path / "whole", capsys, **OFT, save_every_n_steps=2, save_state=True)
    state = earlier(tmp_path / "whole" / "dog-step00000002-state")
    weights = load_file(state / "model.safetensors")
    save_file({key.replace("lora_unet", "oft_unet"): value for key, value in weights.items()},
              state / "model.safetensors")  # fmt: skip
    rest = train(world, tmp_path / "rest", capsys, **OFT, resume=state)
    assert rest.losses == {3: whole.losses[3]}
    assert_equal_files(tmp_path / "whole" / "dog.safetensors", tmp_path / "rest" / "dog.safetensors")


def test_an_oft_of_sd_scripts_is_trained_on(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under sd-scripts' names, with the constraint beside the blocks: the same rotations, under the written names."""
    train(world, tmp_path / "first", capsys, **OFT, max_train_steps=2)
    new = tmp_path / "first" / "dog.safetensors"
    tensors = load_file(new)
    assert all(key.startswith("lora_unet_") for key in tensors)
    assert not any(float(value) for key, value in tensors.items() if key.endswith(".alpha"))
    old = tmp_path / "old.safetensors"
    constraint = {key: torch.tensor(1e-4) for key in tensors if key.endswith(".alpha")}
    loose = {key: 7 * value for key, value in tensors.items() if key.endswith(".oft_blocks")}  # beyond the constraint
    save_file({key.replace("lora_", "oft_", 1): value for key, value in (constraint | loose).items()}, old)
    still: dict[str, Any] = {"learning_rate": 1e-20, "max_train_steps": 1}
    for file in (new, old):
        for dims in ({}, {"network_dim": None, "dim_from_weights": True}):
            train(world, tmp_path / "again", capsys, **{**OFT, **still, **dims}, network_weights=file)
            again = load_file(tmp_path / "again" / "dog.safetensors")
            assert again.keys() == tensors.keys()
            for key in loose:
                skew = tensors[key] - tensors[key].mT
                found = again[key] - again[key].mT
                limit = 1e-4 * skew.shape[0] * skew.shape[1]
                assert float(found.norm()) <= limit * (1 + 1e-5)
                if file == new:
                    assert torch.allclose(found, skew, rtol=1e-5, atol=1e-9)
                else:
                    assert torch.allclose(found, 7 * skew * limit / max(limit, float(7 * skew.norm())), rtol=1e-4)


def test_the_plan_says_what_cannot_be_loaded(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def plan(**flags: object) -> str:
        outcome = run(world.arguments(tmp_path, **{**COMMON, **flags}, dry_run=True), capsys, train_network.RECIPE)
        assert outcome.code == 0, outcome.err
        return outcome.out

    assert "A1111 can load the result, ComfyUI and diffusers cannot" in plan(network_module="networks.ia3")
    assert "per output (wd_on_output=True): ComfyUI and A1111 draw other images with it" in plan(**BY_OUTPUT)
    lycoris = {"network_module": "lycoris.kohya", "network_args": ["algo=lora", "dora_wd=True"]}
    assert "wd_on_output=False is the form that they read" in plan(**lycoris)
    fits = {**lycoris, "network_args": ["algo=lora", "dora_wd=True", "wd_on_output=False"]}
    for flags in ({}, DORA, OFT, fits, {"network_module": "networks.lokr"}):
        assert "load the result" not in (said := plan(**flags)) and "other images" not in said, flags


def test_files_of_other_programs_are_trained_on(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ComfyUI's names of a U-Net: the same file comes back under kohya's."""
    train(world, tmp_path / "first", capsys, max_train_steps=1)
    tensors = load_file(tmp_path / "first" / "dog.safetensors")
    native = re.compile(r"lora_unet_mid_block_attentions_0_(proj_in|proj_out|transformer_blocks_0_.+)\.(\w+.*)")
    theirs = {}
    for key, value in tensors.items():
        if match := native.fullmatch(key):
            layer = match[1].replace("_0_", ".0.", 1) if match[1].startswith("t") else match[1]
            theirs[f"diffusion_model.middle_block.1.{layer}.{match[2]}"] = value
        else:
            theirs[key] = value
    assert len(theirs.keys() - tensors.keys()) == 3 * 12
    save_file(theirs, tmp_path / "native.safetensors")
    flags: dict[str, Any] = {"learning_rate": 1e-20, "max_train_steps": 1}
    train(world, tmp_path / "again", capsys, **flags, network_weights=tmp_path / "native.safetensors")
    again = load_file(tmp_path / "again" / "dog.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)
