"""The peak of a run's memory on a device is the one that the plan predicts, weights and optimizer state included."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

import train_db
import train_network
from library.options.parse import parse
from library.training import memory_watch
from library.training.plan.plan import decide
from library.training.recipe import Recipe
from tests.pretend_device.device import chosen
from tests.training.on_a_device.cases import make_data
from tests.training.running import World, run

LORA = {"network_module": "networks.lora", "network_dim": 4, "cache_latents": True}
HALF = {"mixed_precision": "bf16", "full_bf16": True}

RUNS: dict[str, tuple[str, Recipe, dict[str, Any]]] = {
    "all weights": ("sd1", train_db.RECIPE, {"train_batch_size": 2}),
    "fused, checkpointing": (
        "sd1",
        train_db.RECIPE,
        {**HALF, "fused_backward_pass": True, "gradient_checkpointing": True, "cache_latents": True},
    ),
    "accumulation, EMA, state by shapes": (
        "sd2",
        train_db.RECIPE,
        {
            "gradient_accumulation_steps": 2,
            "use_ema": True,
            "ema_device": "accelerator",
            "mixed_precision": "bf16",
            "optimizer_type": "Adafactor",
            "stop_text_encoder_training": -1,
        },
    ),
    "LoRA": ("sd1", train_network.RECIPE, {**LORA, "train_batch_size": 2}),
    "LoRA, options chosen for a card": ("sd1", train_network.RECIPE, {**LORA, "cache_latents": None, "vram": 4}),
    "LoRA, captions encoded, blocks swapped": (
        "sdxl",
        train_network.RECIPE,
        {
            **LORA,
            "network_train_unet_only": True,
            "cache_text_encoder_outputs": True,
            "mixed_precision": "bf16",
            "gradient_checkpointing": True,
            "blocks_to_swap": 10,
            "resolution": 128,
        },
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_data(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", RUNS)
def test_the_peak_is_predicted(
    name: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, recipe, flags = RUNS[name]
    model = world.root / f"{family}.safetensors"
    flags = {"max_train_steps": 2, "pretrained_model_name_or_path": model, "resolution": 64, **flags}
    arguments = world.arguments(tmp_path, **flags)
    with chosen() as device:
        memory = decide(parse(arguments, recipe.program)).memory
        assert memory is not None
        gc.collect()  # what an earlier run left
        device.reset_peak()
        before = device.memory
        monkeypatch.setattr(memory_watch, "peak_bytes", lambda _: device.peak - before)
        outcome = run(arguments, capsys, recipe)
        assert outcome.code == 0, outcome.err
        assert "than predicted" not in outcome.out + outcome.err
        assert ("--vram 4 sets --cache_latents" in outcome.out) == ("vram" in flags)
        assert device.peak - before == pytest.approx(memory.peak, rel=0.05), memory.largest
