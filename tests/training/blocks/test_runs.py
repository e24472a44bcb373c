"""What happens block by block in real trainings: losses and files stay the same bit for bit, resumed ones too.

A CPU computes in main memory, where swapping saves nothing and has no effect. Here the plan is made to believe that it
does not.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import train_network
from library.training.blocks import plan as blocks_plan
from library.training.blocks.host_inputs import HostInputs
from library.training.blocks.swap import BlockSwap
from tests.training.running import Outcome, World, assert_equal_files, make_world, run

LORA = {"network_module": "networks.lora", "network_dim": 2, "train_batch_size": 2, "use_safetensors": None}
SMALL = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_policy": "attention",
    "cpu_offload_checkpointing": True,
    "blocks_to_swap": 9,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    (world.root / "prompts.txt").write_text("a dog --w 64 --h 64 --s 2\n", encoding="utf-8")
    return world


def train(world: World, out: Path, capsys: pytest.CaptureFixture[str], **flags: object) -> Outcome:
    outcome = run(world.arguments(out, **{**LORA, **flags}), capsys, train_network.RECIPE)
    assert outcome.code == 0, outcome.err
    return outcome


def test_losses_of_20_steps_stay_the_same_and_resumed_is_uninterrupted(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a preview, validation, a rollout, an anchor and an average on the way."""
    flags = {
        "max_train_steps": 20,
        "sample_prompts": world.root / "prompts.txt",
        "sample_every_n_steps": 18,
        "validation_split": 0.34,
        "validate_every_n_steps": 18,
        "scheduled_sampling_max_step_offset": 1,
        "preservation": ["reg_images", "blank_prompt=0.1"],
        "reg_data_dir": world.root / "reg",
        "use_ema": True,
    }
    plain = train(world, tmp_path / "plain", capsys, **flags)
    monkeypatch.setattr(blocks_plan, "is_main_memory", lambda machine: False)
    fetched, taken = spy(monkeypatch, BlockSwap, "_fetch"), spy(monkeypatch, HostInputs, "_take")
    small = train(world, tmp_path / "small", capsys, **flags, **SMALL, save_every_n_steps=17, save_state=True)
    assert "blocks of the U-Net in main memory" in small.out
    assert len(fetched) > 20 * 9 and len(taken) > 20 * 9
    assert small.losses == plain.losses and len(plain.losses) == 20
    assert_equal_files(tmp_path / "plain" / "dog.safetensors", tmp_path / "small" / "dog.safetensors")
    state = tmp_path / "small" / "dog-step00000017-state"
    rest = train(world, tmp_path / "rest", capsys, **flags, blocks_to_swap=3, resume=state)
    assert rest.losses == {step: loss for step, loss in plain.losses.items() if step > 17}
    assert_equal_files(tmp_path / "plain" / "dog.safetensors", tmp_path / "rest" / "dog.safetensors")


def spy(monkeypatch: pytest.MonkeyPatch, of: type, name: str) -> list[object]:
    """The calls of a method."""
    calls: list[object] = []
    method = getattr(of, name)

    def spying(self: object, given: object) -> object:
        calls.append(given)
        return method(self, given)

    monkeypatch.setattr(of, name, spying)
    return calls


def test_what_has_no_effect_is_said_and_what_cannot_be_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = {**LORA, "dry_run": True}
    small = run(world.arguments(tmp_path, **lora, **SMALL), capsys, train_network.RECIPE)
    assert small.code == 0
    assert "--blocks_to_swap has no effect" in small.out and "--cpu_offload_checkpointing has no effect" in small.out
    many = run(world.arguments(tmp_path, **lora, blocks_to_swap=99), capsys, train_network.RECIPE)
    assert many.code != 0 and "--blocks_to_swap 99: the U-Net has" in many.err
    full = run(world.arguments(tmp_path, dry_run=True, blocks_to_swap=1), capsys)
    assert full.code != 0 and "--blocks_to_swap 1: all weights are trained" in full.err
    alone = run(
        world.arguments(tmp_path, **lora, gradient_checkpointing_policy="half", cpu_offload_checkpointing=True),
        capsys,
        train_network.RECIPE,
    )
    assert "gradient_checkpointing is not set" in alone.out
