"""Two processes with DeepSpeed's engine train as one process without it. Needs the package, which CI does not have.

All runs happen in one pair of processes (pairs.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from library.options.packages import installed_version
from library.training.saving.state import read_state
from library.training.saving.whole_states import damage
from tests.training.pairs import Case, run_pair
from tests.training.running import Outcome, World, assert_equal_files, make_world, recorded_losses, run
from tests.training.sharding.test_runs import found_by, largest_difference
from tests.training.sharding.zero_calls import PLANS, RECIPE, skipping

pytestmark = pytest.mark.skipif(installed_version("deepspeed") is None, reason="needs the package deepspeed")
ROOM = "tests.training.sharding.zero_calls"
# accumulation, clipping that acts, and a step that is skipped
FLAGS: dict[str, object] = {
    "train_text_encoder": "false", "gradient_checkpointing": True, "max_train_steps": 3, "max_grad_norm": 0.1,
    "optimizer_args": ["eps=1e-3"], "max_nonfinite_steps": 1, "resolution": 128,
}  # fmt: skip
STAGES = (2, 3)


@dataclass(frozen=True)
class Shared:
    """What the two processes did: the results of zero_calls.engine, and by stage the whole run and its end resumed."""

    world: World
    root: Path
    engine: list[Outcome]
    whole: dict[int, list[Outcome]]
    resumed: dict[int, list[Outcome]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    root = tmp_path_factory.mktemp("shared")
    world = make_world(root)
    cases = [Case(ROOM, function="engine")]
    for stage in STAGES:
        flags = {**FLAGS, "gradient_accumulation_steps": 2, "deepspeed": True, "zero_stage": stage}
        state = root / f"whole{stage}" / "dog-step00000001-state"
        whole = world.arguments(root / f"whole{stage}", **flags, save_state=True, save_every_n_steps=1)
        cases.append(Case(ROOM, whole, "skipping"))
        cases.append(Case(ROOM, world.arguments(root / f"resumed{stage}", **flags, resume=state), "skipping"))
    engine, *runs = run_pair(cases, root / "pair")
    return Shared(
        world, root, engine, dict(zip(STAGES, runs[::2], strict=True)), dict(zip(STAGES, runs[1::2], strict=True))
    )


@pytest.mark.parametrize("plan", PLANS)
def test_the_engine_steps_as_one_process(shared: Shared, plan: str) -> None:
    for outcome in shared.engine:
        found = found_by(outcome)[plan]
        assert found["norms"] < 1e-5 and found["difference"] < 1e-6
        assert found["infinite"] and found["unchanged"] and found["resumed"]


def test_a_single_process_may_offload(shared: Shared, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {**FLAGS, "max_train_steps": 1, "resolution": 64}
    offloaded = {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "cpu"}
    for name, more in (("plain", {}), ("offloaded", {"deepspeed": True, **offloaded})):
        outcome = run(shared.world.arguments(tmp_path / name, **flags, **more), capsys)
        assert outcome.code == 0, outcome.err
    os.environ.pop("LOCAL_RANK", None)  # which a run leaves to the end of its process
    names = (tmp_path / name / "dog.safetensors" for name in ("plain", "offloaded"))
    assert largest_difference(*names) < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_is_that_of_one_process_and_resumes_exactly(
    shared: Shared, stage: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for outcomes in (shared.whole[stage], shared.resumed[stage]):
        writer, other = outcomes
        assert writer.code == other.code == 0, writer.err + str(other.code) + other.err
        assert "at step 2" in writer.err and not other.out
    words = shared.world.arguments(tmp_path, **{**FLAGS, "gradient_accumulation_steps": 4})
    with recorded_losses() as losses:
        assert skipping(RECIPE, words) == 0
    assert shared.whole[stage][0].losses == pytest.approx(losses, rel=1e-5) and sorted(losses) == [1, 3]
    assert largest_difference(shared.root / f"whole{stage}" / "dog.safetensors", tmp_path / "dog.safetensors") < 1e-5
    assert_equal_files(
        shared.root / f"whole{stage}" / "dog.safetensors", shared.root / f"resumed{stage}" / "dog.safetensors"
    )
    state = read_state(shared.root / f"whole{stage}" / "dog-step00000001-state")
    assert state.is_sharded and not damage(state)
