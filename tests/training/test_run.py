"""A run tells its listeners what it logs, and its sinks what it says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from library.options.parse import parse
from library.training.console import Console
from library.training.events.events import Event, Events
from library.training.run import Run


def test_listeners_hear_all_values_also_without_trackers() -> None:
    heard: list[Any] = []
    run = Run(accelerator=None, console=None, listeners=[heard.append])  # type: ignore[arg-type]
    run.log({"loss": 0.5}, 3)
    run.log({"evaluation/dino": 0.7}, 4)
    assert heard == [{"loss": 0.5}, {"evaluation/dino": 0.7}]


@dataclass
class Kept:
    """A sink that keeps the events."""

    events: list[Event] = field(default_factory=list)

    def write(self, event: Event) -> None:
        self.events.append(event)

    def end(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_warning_is_told_from_what_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """In the log by its level, and in its event."""
    kept = Kept()
    console = Console(parse([]).options.run)
    run = Run(accelerator=None, console=console, events=Events(sinks=[kept]))  # type: ignore[arg-type]
    run.say("drawing")
    run.warn("no sample images")
    log = capsys.readouterr().err.splitlines()
    assert "INFO drawing" in log[0] and "WARNING no sample images" in log[1]
    assert [event.data for event in kept.events] == [
        {"message": "drawing"}, {"message": "no sample images", "severity": "warning"}
    ]  # fmt: skip
