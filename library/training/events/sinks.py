"""Where the events of a run go: which sinks it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from library.training.events.events import Events
from library.training.events.record import Record
from library.training.saving.state import Progress


def open_events(record: Path, start: Mapping[str, object], progress: Progress, say: Callable[[str], None]) -> Events:
    """The events of a run that begins at `progress`, with the data of its first event (see plan/summary.py), and the
    file of its record. `say` writes a log line that is no event."""
    resumed = start["stage"] == "resumed"
    return Events(start, [Record(record, str(start["run"]), resumed, say)], progress)
