"""What the plan of several processes refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

import train_network
from library.options.mistakes import UserError
from library.options.parse import parse
from library.runtime.launch import ALONE, Launch
from library.training.plan.plan import decide
from tests.training.running import make_world

PAIR = Launch(0, 2, 0, 2)


@pytest.mark.parametrize(
    ("launch", "module", "argument", "is_refused"),
    [
        (PAIR, "networks.lora", "module_dropout=0.1", True),
        (PAIR, "lycoris.kohya", "module_dropout=0.1", True),
        (PAIR, "networks.lora", "module_dropout=0", False),
        (PAIR, "lycoris.kohya", "module_dropout=0.0", False),
        (PAIR, "networks.lora", "rank_dropout=0.1", False),
        (ALONE, "networks.lora", "module_dropout=0.1", False),
    ],
)
def test_a_static_graph_with_layers_that_are_left_out(
    tmp_path: Path, launch: Launch, module: str, argument: str, is_refused: bool
) -> None:
    flags = {"network_module": module, "network_dim": 2, "network_args": [argument], "use_safetensors": None}
    words = make_world(tmp_path).arguments(tmp_path / "out", ddp_static_graph=True, **flags)
    told = ""
    try:
        decide(parse(words, train_network.RECIPE.program), launch)
    except UserError as error:
        told = str(error)
    assert ("--ddp_static_graph with module_dropout" in told) is is_refused
    assert is_refused or not told
