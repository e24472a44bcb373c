"""The predicted memory of a run is what its steps allocate: the whole recipe, on miniatures, counted by torch's own
operations on a CPU. Other runs, with all that is there beside the step: tests/training/on_a_device/test_peak.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

import train_db
import train_network
from library.options.parse import parse
from library.runtime.device import DeviceKind
from library.training.loop import Loop
from library.training.plan.memory.assumptions import DEVICES
from library.training.plan.memory.prediction import Prediction
from library.training.plan.plan import decide
from library.training.recipe import Recipe
from library.training.sharding.zero_plan import Zero
from tests import tiny
from tests.footprint.counted import Counted
from tests.training.running import World, make_world, run

ADAPTER = {"network_module": "networks.lora", "network_dim": 4, "learning_rate": None, "unet_lr": 1e-3}
RUNS: dict[str, tuple[str, Recipe, dict[str, Any]]] = {
    "all weights, bf16": (
        "sd2",
        train_db.RECIPE,
        {"mixed_precision": "bf16", "gradient_checkpointing": True, "stop_text_encoder_training": -1},
    ),
    "LoRA, checkpointing and bf16": (
        "sdxl",
        train_network.RECIPE,
        {
            **ADAPTER,
            "mixed_precision": "bf16",
            "gradient_checkpointing": True,
            "network_train_unet_only": True,
            "cache_latents": True,
        },
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    for family in ("sd2", "sdxl"):
        tiny.write_single_file(root / f"{family}.safetensors", family)
    return make_world(root)


def predicted(arguments: list[str], recipe: Recipe) -> Prediction:
    memory = decide(parse(arguments, recipe.program)).memory
    assert memory is not None
    return memory


@pytest.mark.parametrize("name", RUNS)
def test_a_step_allocates_what_was_predicted(
    name: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, recipe, flags = RUNS[name]
    model = world.root / f"{family}.safetensors"
    flags = {"max_train_steps": 1, "pretrained_model_name_or_path": model, "resolution": 128, **flags}
    arguments = world.arguments(tmp_path, **flags)
    step = next(moment for moment in predicted(arguments, recipe).moments if moment.title == "a step")
    counted = Counted()
    train = Loop.train

    def watched(self: Loop, progress: Any) -> Any:
        with counted:
            return train(self, progress)

    monkeypatch.setattr(Loop, "train", watched)
    outcome = run(arguments, capsys, recipe)
    assert outcome.code == 0, outcome.err
    expected = step.parts.get("activations", 0) + step.parts.get("gradients", 0)
    assert counted.peak == pytest.approx(expected, rel=0.05)


def test_what_processes_share_out_is_not_predicted(world: World, tmp_path: Path) -> None:
    plan = decide(parse(world.arguments(tmp_path), train_db.RECIPE.program))
    assert plan.memory is not None
    assert replace(plan, facts=replace(plan.facts, zero=Zero(2, 2))).memory is None


def test_every_kind_of_device_has_its_assumptions() -> None:
    assert set(DEVICES) >= set(get_args(DeviceKind))
