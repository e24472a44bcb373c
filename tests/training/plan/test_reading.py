"""After how many steps losses are read: as asked for where the device can leave a step out by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from library.options.groups.optimizer import OptimizerOptions
from library.training.optim.optimizers import choose_optimizer
from library.training.plan.reading import ON_A_CARD, decide_read_interval
from library.training.update.plan import UpdatePlan


def decide(
    optimizer: str = "AdamW", adapter: Any = None, arguments: tuple[str, ...] = (), **given: Any
) -> tuple[int, list[str]]:
    """The interval of a run on a card, and its notes."""
    facts: Any = SimpleNamespace(
        options=SimpleNamespace(
            run=SimpleNamespace(loss_read_interval=given.get("asked")),
            adapter=SimpleNamespace(scale_weight_norms=given.get("norms")),
        ),
        machine=SimpleNamespace(is_cpu=given.get("cpu", False)),
        precision=SimpleNamespace(uses_scaler=given.get("scaler", False)),
        sharding=given.get("sharding"),
        zero=given.get("zero"),
    )
    update = UpdatePlan(fuses=given.get("fuses", False))
    notes: list[str] = []
    choice = choose_optimizer(OptimizerOptions(optimizer_type=optimizer, optimizer_args=arguments))
    return decide_read_interval(facts, choice, update, adapter, notes), notes


def test_on_a_card_they_are_read_together_and_on_the_cpu_at_once() -> None:
    assert decide() == decide("torch.optim.Adam") == (ON_A_CARD, [])
    assert decide(cpu=True) == (1, [])
    assert decide(cpu=True, asked=4) == decide(asked=4) == (4, [])


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"scaler": True}, "the loss scale of fp16"),
        ({"optimizer": "Lion"}, "the optimizer Lion cannot leave out a step"),
        ({"arguments": ("foreach=True",)}, "the optimizer AdamW cannot leave out a step"),
        ({"sharding": object()}, "the weights are shared out"),
        ({"zero": object()}, "the weights are shared out"),
        ({"fuses": True}, "weights are updated part by part"),
        ({"norms": 1.0}, "--scale_weight_norms"),
        ({"adapter": SimpleNamespace(settings=None, module="lycoris.kohya")}, "lycoris.kohya may count steps"),
    ],
)
def test_each_is_read_at_once_where_the_device_cannot_leave_it_out(given: dict[str, Any], why: str) -> None:
    """The user is told only what they asked for and do not get."""
    assert decide(**given) == (1, [])
    interval, (note,) = decide(asked=4, **given)
    assert interval == 1 and note.startswith("--loss_read_interval 4: ") and why in note
