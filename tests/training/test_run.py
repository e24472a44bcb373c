"""A run tells its listeners what it logs."""

from __future__ import annotations

from typing import Any

from library.training.run import Run


def test_listeners_hear_all_values_also_without_trackers() -> None:
    heard: list[Any] = []
    run = Run(accelerator=None, console=None, listeners=[heard.append])  # type: ignore[arg-type]
    run.log({"loss": 0.5}, 3)
    run.log({"evaluation/dino": 0.7}, 4)
    assert heard == [{"loss": 0.5}, {"evaluation/dino": 0.7}]
