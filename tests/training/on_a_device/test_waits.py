"""A step waits for the device in one place, where the numbers of several steps are read, and uploads its batch only."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import train_db
import train_network
from library.training.recipe import Recipe
from library.training.steps import Steps
from tests.pretend_device.device import Event, chosen
from tests.training.on_a_device.cases import make_data
from tests.training.running import World, run

LORA = {"network_module": "networks.lora", "network_dim": 2}
STEPS = 6
LARGEST = 2 * 3 * 80 * 80 * 4  # bytes of the pixels of a batch


def _with_folder(value: Any, world: World) -> Any:
    return value.replace("@", str(world.root)) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_data(tmp_path_factory.mktemp("world"))


def steps_of(
    world: World, out: Path, capsys: pytest.CaptureFixture[str], recipe: Recipe, **flags: Any
) -> list[list[Event]]:
    """What happens on the device in each step: from the end of one to the end of the next."""
    ends: list[int] = []
    take = Steps.take
    with chosen() as device, pytest.MonkeyPatch.context() as patch:

        def counting(self: Steps, *arguments: Any) -> None:
            take(self, *arguments)
            ends.append(len(device.events))

        patch.setattr(Steps, "take", counting)
        chosen_flags = {key: _with_folder(value, world) for key, value in flags.items()}
        common = {"max_train_steps": STEPS, "train_batch_size": 2, "cache_latents": True, "loss_read_interval": 4}
        outcome = run(world.arguments(out, **{**common, **chosen_flags}), capsys, recipe)
        assert outcome.code == 0, outcome.err
        assert sorted(outcome.losses) == [*range(1, STEPS + 1)]
        return [device.events[begin:end] for begin, end in zip(ends, ends[1:], strict=False)]


RUNS: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "every weighting and noise": (
        train_network.RECIPE,
        {
            **LORA, "network_train_unet_only": True, "min_snr_gamma": 5, "loss_type": "huber", "noise_offset": 0.1,
            "multires_noise_iterations": 2, "ip_noise_gamma": 0.1, "use_ema": True, "ema_device": "accelerator",
        },
    ),
    "SDXL, masks, averages": (
        train_db.RECIPE,
        {
            "pretrained_model_name_or_path": "@/sdxl.safetensors", "cache_text_encoder_outputs": True,
            "learning_rate_te": 0, "gradient_accumulation_steps": 2, "masked_loss": True, "mask_floor": 0.1,
            "conditioning_data_dir": "@/masks", "empty_caption": "zeros", "caption_dropout_rate": 0.5,
            "posthoc_ema_snapshots": 1, "ema_device": "accelerator",
        },
    ),
    "anchors": (train_network.RECIPE, {**LORA, "preservation": ["base_prediction=0.5"], "reg_data_dir": "@/reg"}),
    "pixels, with a rollout": (
        train_db.RECIPE,
        {
            "cache_latents": False, "gradient_checkpointing": True, "scheduled_sampling_max_step_offset": 4,
            "scheduled_sampling_probability": 1.0, "scheduled_sampling_sampler": "euler",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_step_waits_only_where_several_are_read(
    name: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, flags = RUNS[name]
    steps = steps_of(world, tmp_path, capsys, recipe, **flags)
    waits = [Counter(event.line for event in events if event.waits) for events in steps]
    places = {line.partition(":")[0] for lines in waits for line in lines}
    assert places == {"library/training/late.py"}, waits
    assert all(lines.total() <= 1 for lines in waits) and any(not lines for lines in waits)
    uploads = [event.bytes for events in steps for event in events if event.kind == "upload"]
    assert max(uploads) <= LARGEST, "more than a batch was uploaded"


def test_an_optimizer_that_cannot_leave_a_step_out_is_read_once_per_step(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = steps_of(world, tmp_path, capsys, train_network.RECIPE, **LORA, optimizer_type="SGDNesterov")
    for events in steps:
        (wait,) = [event for event in events if event.waits]
        assert wait.kind == "read" and wait.line.startswith("library/training/steps.py")
