"""What the plan decides, counts and refuses of the update of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from library.options.mistakes import UserError
from library.options.parse import parse
from library.training.plan.plan import Plan, decide
from library.training.plan.text import describe
from library.training.update.plan import AT_ONCE
from tests.training.running import World, make_world

FUSED = {"fused_backward_pass": True}
BF16 = {"mixed_precision": "bf16", "full_bf16": True}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def plan_of(world: World, tmp_path: Path, **flags: Any) -> Plan:
    return decide(parse(world.arguments(tmp_path, max_train_steps=2, **flags)))


@pytest.mark.parametrize(
    ("flags", "passes"),
    [
        ({}, 2),  # max_grad_norm is 1
        ({"max_grad_norm": 0}, 1),
        ({"max_grad_norm": 0, "max_nonfinite_steps": 3}, 2),  # a step can be skipped whole
        ({"fused_backward_clipping": "tensor"}, 1),
    ],
)
def test_a_second_pass_where_all_gradients_must_be_known(
    flags: dict[str, Any], passes: int, world: World, tmp_path: Path
) -> None:
    plan = plan_of(world, tmp_path, **FUSED, **flags)
    assert plan.optimization.update.two_passes == (passes == 2)
    assert ("two" if passes == 2 else "one") + " backward pass" in describe(plan)


def test_what_a_fused_pass_cannot_do(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_optimizer.py").write_text("class Own:\n    def __init__(self, params, lr): ...\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for flags, says in (
        ({"optimizer_type": "Prodigy"}, "Prodigy estimates its learning rate from all gradients"),
        ({"optimizer_type": "dadaptation.DAdaptLion"}, "estimates its learning rate"),
        ({"optimizer_type": "own_optimizer.Own"}, "Own is not known to step each weight by its own gradient alone"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_policy": "attention"}, "such blocks once"),
        ({"fused_optimizer_groups": 3}, "both update the weights during the backward pass"),
    ):
        with pytest.raises(UserError) as error:
            plan_of(world, tmp_path, **FUSED, **flags)
        assert says in str(error.value)
    with pytest.raises(UserError, match="offload_optimizer: Prodigy"):
        plan_of(world, tmp_path, offload_optimizer=True, optimizer_type="Prodigy")


def test_notes_say_what_has_no_effect(world: World, tmp_path: Path) -> None:
    plan = plan_of(world, tmp_path, **FUSED, gradient_accumulation_steps=2)
    assert not plan.optimization.update.fuses
    assert any("--fused_backward_pass has no effect: gradients of 2 batches" in note for note in plan.notes)
    plan = plan_of(world, tmp_path, offload_optimizer=True, bf16_rounding="kahan", fused_backward_clipping="tensor")
    text = "\n".join(plan.notes)
    assert all(name in text for name in ("--offload_optimizer", "bf16_rounding", "fused_backward_clipping"))
    assert plan.optimization.update.rounding is None and not plan.optimization.update.offloads
    quiet = " ".join(plan_of(world, tmp_path).notes)
    assert not any(name in quiet for name in ("bf16_rounding", "fused", "offload"))


def test_costs(world: World, tmp_path: Path) -> None:
    """bf16 weights: 2 bytes, gradients 2, moments 8, with Kahan 2 more; rounded to the nearest 2, 2 and 4. Fused: what
    is stepped at once and the largest weight, of a miniature never more than all."""
    plain = plan_of(world, tmp_path)
    sizes, modules = plain.facts.base_model.sizes, plain.optimization.learning_rates.modules
    trained = sizes.total(modules)
    assert plain.costs.gradients == 4 * trained and plain.costs.optimizer == 8 * trained
    for rounding, state in (("stochastic", 8), ("kahan", 10), ("nearest", 4)):
        costs = plan_of(world, tmp_path, **BF16, bf16_rounding=rounding).costs
        assert costs.gradients == 2 * trained and costs.optimizer == state * trained
    groups = plan_of(world, tmp_path, fused_optimizer_groups=4)
    assert groups.costs.gradients == trained * 4 // 4 + sizes.largest(modules) * 4
    assert groups.costs.state_folder == plain.costs.state_folder
    fused = plan_of(world, tmp_path, **FUSED)
    assert fused.costs.gradients == min(4 * trained, 4 * (AT_ONCE + sizes.largest(modules)))
