"""What flags and accelerate's variables for DeepSpeed mean, its configuration, and what is refused with it. Without the
package."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from library.options.groups.deepspeed import DeepSpeedOptions
from library.options.mistakes import Mistakes
from library.runtime.launch import Launch
from library.training.optim.optimizer_table import OPTIMIZERS
from library.training.plan.costs import Costs, PeakFiles
from library.training.sharding import zero_plan
from library.training.sharding.zero_plan import Zero, check_zero, engine_config, read_zero

PAIR = Launch(0, 2, 0, 2)
ACCELERATE = {"ACCELERATE_USE_DEEPSPEED": "true"}
COSTS = Costs(14, 10, 20, 0, 14, 30, PeakFiles(1, 0, 0), None)


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_plan, "installed_version", lambda package: "0.19.8")


def read(
    environment: dict[str, str] | None = None, launch: Launch = PAIR, **flags: Any
) -> tuple[Zero | None, list[str], list[str]]:
    mistakes, notes = Mistakes(), list[str]()
    zero = read_zero(DeepSpeedOptions(**flags), environment or {}, launch, mistakes, notes)
    return zero, [str(mistake) for mistake in mistakes], notes


def test_flags_and_variables_of_accelerate_mean_the_same() -> None:
    assert read() == (None, [], [])
    assert read(zero_stage=3, offload_param_device="cpu") == (None, [], []), "nothing without --deepspeed"
    assert read(deepspeed=True) == read(ACCELERATE) == (Zero(2, 2), [], [])
    flags = read(deepspeed=True, zero_stage=3, offload_optimizer_device="cpu", offload_param_device="cpu")
    assert flags == (Zero(2, 3, optimizer_on_cpu=True, weights_on_cpu=True), [], [])
    prefix = "ACCELERATE_DEEPSPEED_"  # accelerate/utils/launch.py
    variables = {
        f"{prefix}ZERO_STAGE": "3", f"{prefix}OFFLOAD_OPTIMIZER_DEVICE": "cpu", f"{prefix}OFFLOAD_PARAM_DEVICE": "cpu",
        f"{prefix}ZERO3_INIT": "none", f"{prefix}ZERO3_SAVE_16BIT_MODEL": "false",
    }  # fmt: skip
    assert read(ACCELERATE | variables) == flags
    assert read(ACCELERATE | variables, deepspeed=True)[0] == Zero(2, 2), "flags count, as in sd-scripts"
    assert read(deepspeed=True, launch=Launch())[0] == Zero(1, 2), "a single process may offload"


def test_what_needs_no_flag_is_noted() -> None:
    zero, mistakes, notes = read(deepspeed=True, zero_stage=3, zero3_init_flag=True, zero3_save_16bit_model=True)
    assert zero == Zero(2, 3) and not mistakes
    assert "--zero3_init_flag is not needed" in notes[0] and "--zero3_save_16bit_model is not needed" in notes[1]
    zero, _, (note,) = read(deepspeed=True, zero_stage=0)
    assert zero is None and "shares out nothing" in note
    (note,) = read(deepspeed=True, offload_param_nvme_path=Path("/n"))[2]
    assert note.startswith("--offload_param_nvme_path /n has no effect")
    (note,) = read(ACCELERATE | {"ACCELERATE_GRADIENT_CLIPPING": "1.0"})[2]
    assert "--max_grad_norm" in note


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"offload_optimizer_device": "nvme", "offload_optimizer_nvme_path": "/n"}, "could not be resumed"),
        ({"zero_stage": 3, "offload_param_device": "nvme"}, "use cpu for --offload_param_device"),
        ({"offload_param_device": "cpu"}, "set --zero_stage 3"),
        ({"zero_stage": 0, "offload_optimizer_device": "cpu"}, "set --zero_stage 1, 2 or 3"),
        ({"fp16_master_weights_and_gradients": True}, "fp16 cannot be trained"),
    ],
)
def test_settings_that_cannot_be_are_refused(flags: dict[str, Any], words: str) -> None:
    _, (mistake,), _ = read(deepspeed=True, **flags)
    assert words in mistake


def test_a_configuration_file_of_deepspeed_and_fsdp_are_refused() -> None:
    (mistake,) = read(ACCELERATE | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"})[1]
    assert "use its stages and offloading as flags" in mistake
    (mistake,) = read(ACCELERATE | {"ACCELERATE_USE_FSDP": "true"})[1]
    assert "choose one" in mistake
    (mistake,) = read(ACCELERATE | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "two"})[1]
    assert "accelerate's zero_stage two" in mistake


@pytest.mark.parametrize("version", [None, "0.14.4", "1.0.0"])
def test_without_the_package_the_command_that_installs_it_is_named(
    version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero_plan, "installed_version", lambda package: version)
    (mistake,) = read(deepspeed=True)[1]
    assert "pip install deepspeed==0.19.8" in mistake and "--use_fsdp --fsdp_version 2" in mistake


def test_the_configuration_of_the_engine() -> None:
    config = engine_config(Zero(2, 3, optimizer_on_cpu=True, weights_on_cpu=True), 0.5)
    assert json.loads(json.dumps(config)) == config
    assert config["gradient_clipping"] == 0.5 and config["gradient_accumulation_steps"] == 1
    shared = config["zero_optimization"]
    assert shared["stage"] == 3 and shared["offload_optimizer"]["device"] == shared["offload_param"]["device"] == "cpu"
    assert engine_config(Zero(2, 1), 0)["zero_optimization"] == {"stage": 1}
    assert not {"fp16", "bf16", "torch_autocast"} & config.keys(), "weights are float32, autocast is the run's"


def test_memory_is_that_of_one_process() -> None:
    """10 bytes of trained weights, 4 of frozen ones, 20 of optimizer state, and the engine's copy of the weights."""
    of = [Zero(2, stage).costs(COSTS) for stage in (1, 2, 3)]
    assert [each.training for each in of] == [4 + 10 + 5 + 10 + 10, 4 + 10 + 5 + 5 + 10, 4 + 5 + 5 + 5 + 10]
    assert Zero(2, 3, optimizer_on_cpu=True, weights_on_cpu=True).costs(COSTS).training == 4
    (line,) = Zero(2, 2).describe(of[1])
    assert "DeepSpeed ZeRO 2 over 2 processes" in line and "optimizer state and gradients" in line


def refused(**changes: Any) -> list[str]:
    row = next(row for row in OPTIMIZERS if row.name == changes.get("optimizer", "AdamW"))
    facts: Any = SimpleNamespace(
        precision=SimpleNamespace(
            mixed_precision=changes.get("mixed_precision", "bf16"), trained=changes.get("trained", "fp32")
        ),
        preservation=SimpleNamespace(is_usual="preservation" not in changes),
        validation=changes.get("validation"),
        base_model=SimpleNamespace(family=SimpleNamespace(backbone="unet")),
        zero=Zero(2, 2),
    )
    rates = SimpleNamespace(modules=dict.fromkeys(changes.get("modules", ("unet",)), 1e-4))
    update = SimpleNamespace(fuses=changes.get("fuses", False), offloads=False)
    chosen = SimpleNamespace(row=row, name=row.name)
    optimization: Any = SimpleNamespace(learning_rates=rates, optimizer=chosen, update=update)
    mistakes = Mistakes()
    alone = [changes.get("preview"), None, None, None]
    check_zero(facts, optimization, changes.get("adapter"), changes.get("ema"), alone, mistakes)
    return [str(mistake) for mistake in mistakes]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter": object()}, "with an adapter"),
        ({"optimizer": "Prodigy"}, "use one of AdamW, Lion, SGDNesterov"),
        ({"mixed_precision": "fp16"}, "--mixed_precision bf16"),
        ({"trained": "bf16"}, "without --full_bf16"),
        ({"fuses": True}, "whose engine takes the steps"),
        ({"modules": ("unet", "text_encoder")}, "train the U-Net alone"),
        ({"ema": object(), "preview": object()}, "--use_ema, --sample_prompts with DeepSpeed"),
    ],
)
def test_what_would_not_mean_the_same_is_refused(changes: dict[str, Any], words: str) -> None:
    (mistake,) = refused(**changes)
    assert words in mistake and "start without DeepSpeed" in mistake


def test_what_works() -> None:
    assert not refused() and not refused(optimizer="Lion", mixed_precision="no")
