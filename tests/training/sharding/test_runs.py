"""Two processes with shards train as one process without: the same losses and files. One that a signal stops saves a
state, which goes on with two processes bit for bit, and in a single one; so does one that an error ends on both.

All sharded runs happen in one pair of processes (pairs.py).
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.training.saving.state import read_state
from library.training.saving.whole_states import damage
from tests.training.pairs import Case, run_pair
from tests.training.running import Outcome, World, assert_equal_files, make_world, run

# both modules trained, one of them stopped; accumulation; clipping that acts; an average. Smaller images have groups of
# one value at the bottom of the miniature, whose norm makes much of rounding; so does Adam of gradients that are zero.
FLAGS: dict[str, object] = {
    "train_text_encoder": True, "stop_text_encoder_training": 1, "max_train_steps": 2, "max_grad_norm": 0.1,
    "resolution": 128, "gradient_checkpointing": True, "use_ema": True, "optimizer_args": ["eps=1e-3"],
}  # fmt: skip


CALLS = ("optimizers", "gathering")


@dataclass(frozen=True)
class Sharded:
    """What the two processes did: the whole run, the same stopped after a step and resumed, one in bfloat16 that an
    error ends, one that cannot be, and the results of shard_calls.py."""

    world: World
    root: Path
    whole: list[Outcome]
    stopped: list[Outcome]
    resumed: list[Outcome]
    half: list[Outcome]
    refused: list[Outcome]
    calls: dict[str, list[Outcome]]

    def words(self, out: Path, accumulation: int, **flags: object) -> list[str]:
        """The command line of the run."""
        return self.world.arguments(out, **{**FLAGS, "gradient_accumulation_steps": accumulation, **flags})

    @property
    def state(self) -> Path:
        """The state after one of the two steps."""
        return self.root / "stopped" / "dog-step00000001-state"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Sharded:
    root = tmp_path_factory.mktemp("sharded")
    world = make_world(root)
    made = Sharded(world, root, [], [], [], [], [], {})
    half: dict[str, object] = {"mixed_precision": "bf16", "use_ema": False}
    cases = [
        Case("train_db", made.words(root / "whole", 2, save_every_n_steps=1)),
        Case("tests.training.sharding.shard_calls", made.words(root / "stopped", 2), "stopped"),
        Case("train_db", made.words(root / "resumed", 2, resume=made.state)),
        Case("tests.training.sharding.shard_calls", made.words(root / "half", 2, **half), "not_finite"),
        Case("train_db", made.words(root / "refused", 2, optimizer_type="Adafactor")),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        patch.setenv("FSDP_VERSION", "2")
        calls = [Case("tests.training.sharding.shard_calls", function=name) for name in CALLS]
        outcomes = run_pair([*calls, *cases], root / "pair")
    return Sharded(world, root, *outcomes[len(calls) :], calls=dict(zip(CALLS, outcomes, strict=False)))


def found_by(outcome: Outcome) -> dict[str, Any]:
    """What a function returned."""
    found: Any = outcome.code
    assert isinstance(found, dict), found
    return found


def largest_difference(one: Path, two: Path) -> float:
    """Between tensors of the same names, shapes and formats."""
    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys()
    assert all(first[name].dtype == second[name].dtype for name in first)
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def test_two_processes_with_shards_train_as_one_without(
    sharded: Sharded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer, other = sharded.whole
    assert writer.code == other.code == 0, writer.err + str(other.code) + other.err
    alone = run(sharded.words(tmp_path, 4, save_every_n_steps=1), capsys)
    assert alone.code == 0, alone.err
    assert writer.losses == pytest.approx(alone.losses, rel=1e-5) and len(alone.losses) == 2
    for name in ("dog", "dog_ema", "dog-step00000001", "dog-step00000001_ema"):
        assert (
            largest_difference(sharded.root / "whole" / f"{name}.safetensors", tmp_path / f"{name}.safetensors") < 1e-5
        )
    assert "sharded over 2 processes" in writer.out and not other.out


def test_a_state_holds_each_tensor_once_and_no_pickled_code(sharded: Sharded) -> None:
    files = sorted(path.name for path in (sharded.state / "shards").iterdir())
    assert len(files) == 2 and all(name.endswith(".safetensors") for name in files)
    shards = [load_file(sharded.state / "shards" / name) for name in files]
    model = load_file(sharded.root / "whole" / "dog-step00000001.safetensors")
    trained = sum(tensor.numel() for name, tensor in model.items() if not name.startswith("first_stage_model."))
    held = [sum(tensor.numel() for tensor in shard.values()) for shard in shards]
    # weights, two moments, an average; the moments of a stopped text encoder stay
    assert sum(held) == pytest.approx(4 * trained, rel=0.01)
    assert max(held) < 0.6 * sum(held), "each process wrote about half"
    for path in sharded.state.glob("*.bin"):
        torch.load(path, weights_only=True)


def test_a_signal_that_one_process_gets_stops_both_with_its_exit_code(sharded: Sharded) -> None:
    writer, other = sharded.stopped
    assert writer.code == other.code == 128 + signal.SIGTERM, writer.err + str(other.code) + other.err
    assert "stopped after step 1: model and state are saved" in writer.err and f"--resume {sharded.state}" in writer.err
    assert not other.out and not other.err
    for name in ("dog-step00000001.safetensors", "dog-step00000001_ema.safetensors"):
        assert_equal_files(sharded.root / "whole" / name, sharded.root / "stopped" / name)


def test_an_error_of_both_saves_the_step_before(sharded: Sharded) -> None:
    """Also in half precision: weights are gathered in bfloat16, kept and saved in float32."""
    writer, other = sharded.half
    assert writer.code == other.code == 2, writer.err + str(other.code) + other.err
    assert "the loss is not finite at step 2" in writer.err and not other.err
    assert "model and state are saved as of step 1: continue with --resume" in writer.err
    assert writer.losses == {1: pytest.approx(sharded.whole[0].losses[1], rel=0.05)}
    saved = load_file(sharded.root / "half" / "dog-step00000001.safetensors")
    assert {tensor.dtype for tensor in saved.values() if tensor.is_floating_point()} == {torch.float32}
    state = read_state(sharded.root / "half" / "dog-step00000001-state")
    assert state.is_sharded and state.progress.step == 1 and not damage(state)


def test_a_resumed_run_is_uninterrupted(sharded: Sharded) -> None:
    writer, other = sharded.resumed
    assert writer.code == other.code == 0, writer.err + str(other.code) + other.err
    assert writer.losses == {2: sharded.whole[0].losses[2]}
    for name in ("dog.safetensors", "dog_ema.safetensors"):
        assert_equal_files(sharded.root / "whole" / name, sharded.root / "resumed" / name)


def test_a_single_process_without_shards_goes_on(
    sharded: Sharded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = run(sharded.words(tmp_path, 4, resume=sharded.state), capsys)
    assert alone.code == 0, alone.err
    assert alone.losses == pytest.approx({2: sharded.whole[0].losses[2]}, rel=1e-5)
    for name in ("dog.safetensors", "dog_ema.safetensors"):
        assert largest_difference(sharded.root / "whole" / name, tmp_path / name) < 1e-5


def test_what_cannot_be_sharded_is_told_once(sharded: Sharded) -> None:
    writer, other = sharded.refused
    assert writer.code == other.code == 2 and not other.err
    assert "--optimizer_type Adafactor with FSDP" in writer.err


def test_optimizers_step_with_parts_as_with_whole_tensors(sharded: Sharded) -> None:
    for outcome in sharded.calls["optimizers"]:
        found = found_by(outcome)
        assert set(found) == {"AdamW", "Lion", "SGDNesterov"} and max(found.values()) < 1e-5


def test_the_writer_gathers_what_it_reads(sharded: Sharded) -> None:
    """In any order, any number of times; an error there leaves the others able to go on."""
    writer, other = (found_by(outcome) for outcome in sharded.calls["gathering"])
    assert writer == {
        "lazy": True, "equal": True, "raised": "the disk is full", "afterwards": 2, "sharded again": True,
    }  # fmt: skip
    assert other == {"afterwards": 2, "sharded again": True}
