"""Where the events of a run go: which sinks it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from library.training.events.events import Events, Sink
from library.training.events.record import Record
from library.training.events.webhook_config import Webhook
from library.training.events.webhooks import WebhookSink
from library.training.saving.state import Progress


def open_events(
    record: Path,
    webhooks: Iterable[Webhook],
    start: Mapping[str, object],
    progress: Progress,
    say: Callable[[str], None],
) -> Events:
    """The events of a run that begins at `progress`, with the data of its first event (see plan/summary.py). They go to
    the file of its record and to webhooks. `say` writes a log line that is no event."""
    resumed = start["stage"] == "resumed"
    sinks: list[Sink] = [Record(record, str(start["run"]), resumed, say)]
    sinks += [WebhookSink(webhook, start, say) for webhook in webhooks]
    return Events(start, sinks, progress)
