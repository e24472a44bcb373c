"""What accelerate's variables for FSDP mean, what a sharded run refuses, and what the plan says of its memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from library.families.family import Family
from library.families.sd.sd import SD1
from library.families.sd.sdxl import SDXL
from library.options.mistakes import Mistakes
from library.runtime.launch import Launch
from library.training.optim.optimizer_table import OPTIMIZERS
from library.training.plan.costs import Costs, PeakFiles
from library.training.sharding.plan import Sharding, check_sharded, read_sharding
from library.training.sharding.shards import units_of
from library.training.sharding.state import put_together
from tests import tiny

PAIR = Launch(0, 2, 0, 2)
COSTS = Costs(14, 10, 20, 0, 14, 30, PeakFiles(1, 0, 0), None)
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def read(environment: dict[str, str], launch: Launch = PAIR) -> tuple[Sharding | None, str]:
    mistakes, notes = Mistakes(), list[str]()
    return read_sharding(environment, launch, mistakes, notes), "\n".join([*map(str, mistakes), *notes])


def test_the_variables_of_accelerate() -> None:
    assert read({}) == (None, "")
    assert read(FSDP2) == (Sharding(2), "")
    assert read(FSDP2 | {"FSDP_RESHARD_AFTER_FORWARD": "false"}) == (Sharding(2, reshard=False), "")
    assert "--fsdp_offload_params false" in read(FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"})[1]
    sharding, told = read({"ACCELERATE_USE_FSDP": "true"})
    assert sharding is None and "--fsdp_version 2" in told
    sharding, told = read(FSDP2, Launch())
    assert sharding is None and "one process" in told
    assert "--gradient_checkpointing" in read(FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"})[1]


def test_a_torch_without_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.training.sharding.plan.installed_version", lambda package: "2.6.0+cu124")
    sharding, told = read(FSDP2)
    assert sharding is None and "torch 2.6.0" in told and "2.9" in told


def refused(**changes: Any) -> list[str]:
    row = next(row for row in OPTIMIZERS if row.name == changes.get("optimizer", "AdamW"))
    facts: Any = SimpleNamespace(
        precision=SimpleNamespace(mixed_precision=changes.get("mixed_precision", "bf16"), trained="fp32"),
        preservation=SimpleNamespace(is_usual="preservation" not in changes),
        validation=changes.get("validation"),
        sharding=Sharding(2),
    )
    mistakes = Mistakes()
    choice: Any = SimpleNamespace(row=row, name=row.name)
    alone = [changes.get("preview"), None, None, changes.get("posthoc")]
    check_sharded(facts, choice, changes.get("adapter"), changes.get("resume"), alone, mistakes)
    return [str(mistake) for mistake in mistakes]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter": object()}, "--base_model_precision"),
        ({"optimizer": "AdamW8bit"}, "use one of AdamW, Lion, SGDNesterov"),
        ({"optimizer": "Adafactor"}, "needs whole tensors|need whole tensors"),
        ({"optimizer": "Prodigy"}, "values of all of them"),
        ({"mixed_precision": "fp16"}, "use bf16"),
        ({"preservation": "blank_prompt"}, "--preservation with FSDP"),
        ({"preview": object()}, "--sample_prompts with FSDP"),
        ({"posthoc": object(), "validation": object()}, "validation, --posthoc_ema_snapshots with FSDP"),
        ({"resume": SimpleNamespace(folder="s", is_sharded=False)}, "this state is not sharded"),
    ],
)
def test_what_has_no_meaning_is_refused(changes: dict[str, Any], words: str) -> None:
    (mistake,) = refused(**changes)
    assert any(word in mistake for word in words.split("|")) and "--use_fsdp" in mistake


def test_what_works() -> None:
    assert not refused() and not refused(optimizer="Lion", resume=SimpleNamespace(folder="s", is_sharded=True))


def test_a_state_that_asks_for_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"0" * 100)
    mark = {"sharded": "unet/weight", "shape": [2**40, 2**20], "dtype": "float32"}
    with pytest.raises(ValueError, match="the shards hold 100 bytes"):
        put_together(tmp_path, {"state": [mark]}, None)
    assert put_together(tmp_path / "none", {"step": [1, (2.0, "x")]}, None) == {"step": [1, (2.0, "x")]}


def test_memory_is_that_of_one_process() -> None:
    """10 bytes of trained weights, 4 of frozen ones, 20 of optimizer state: shared by two, 4 + (10 + 10 + 20) / 2."""
    shared = COSTS.sharded(2)
    assert (COSTS.training, shared.training, shared.shards) == (44, 24, 20)
    assert (shared.model_file, shared.state_folder) == (14, 30), "files are whole"
    (line,) = Sharding(2).describe(shared)
    assert "2 processes" in line


@pytest.mark.parametrize("family", [SD1, SDXL], ids=lambda family: family.name)
def test_blocks_hold_most_of_a_module_and_none_holds_another(family: Family) -> None:
    made = tiny.diffusers_modules(family.name)
    modules = {"unet": made.unet, "text_encoder": made.text_encoder, "text_encoder_2": made.text_encoder_2}
    for name in ("unet", *family.text_encoders):
        module: Any = modules[name]
        units = units_of(module, family.shard_units[name])
        inside = [parameter for unit in units for parameter in unit.parameters()]
        assert len(units) > 1 and len({id(parameter) for parameter in inside}) == len(inside)
        vocabulary = 0 if name == "unet" else 49408 * module.config.hidden_size
        whole = sum(parameter.numel() for parameter in module.parameters()) - vocabulary
        assert sum(parameter.numel() for parameter in inside) > 0.7 * whole
