"""What happens in a run, as events: one kind of record for the run's file, webhooks and the page that follows it.

An event is {type, time, step, data}; docs/events.md describes what the data of each type holds. Types that SimpleTuner
has too have its names.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, Protocol

from library.options.mistakes import UserError
from library.training.saving.state import Progress

EventType = Literal[
    "lifecycle.stage",
    "training.status",
    "training.checkpoint",
    "validation.image",
    "evaluation",
    "notification",
    "error",
]

LOSSES = frozenset({"loss", "loss/epoch", "loss/current", "loss/average", "loss/epoch_average"})
"""Names under which the training loss is logged. Values that are logged without one of them are an evaluation."""


@dataclass(frozen=True)
class Event:
    """Something that happened at `time` (UTC), after `step` finished optimizer steps. `data` is plain: what JSON has,
    though numbers may be infinite or NaN."""

    type: EventType
    time: datetime
    step: int
    data: Mapping[str, object]


class Sink(Protocol):
    """Takes events somewhere. No method raises."""

    def write(self, event: Event) -> None:
        """Take an event. Returns at once: whatever may wait for a disk or a network happens in another thread."""

    def end(self) -> None:
        """Nothing more comes: begin to write what is left. Returns at once."""

    def close(self) -> None:
        """End, and wait until what is left is written, for a bounded time since the end."""


@dataclass
class Events:
    """Hands events to its sinks, in order. Without sinks, as on processes that do not write, nothing happens.
    `start`: data of the first event; its `stage` is started, or resumed. `progress`: where the run is now."""

    start: Mapping[str, object] = field(default_factory=dict)
    sinks: Sequence[Sink] = ()
    progress: Progress = field(default_factory=Progress)

    def emit(self, type: EventType, data: Mapping[str, object], step: int | None = None) -> None:
        """Hand an event that happens now to all sinks. `step`: what it is about, if that is not the last one."""
        event = Event(type, datetime.now(UTC), self.progress.step if step is None else step, data)
        for sink in self.sinks:
            sink.write(event)

    def close(self) -> None:
        """Close all sinks. They write what is left at the same time, so that the slowest decides how long it takes."""
        for sink in self.sinks:
            sink.end()
        for sink in self.sinks:
            sink.close()


@contextmanager
def lifecycle(events: Events) -> Iterator[None]:
    """Emit the start of a run, and its end: finished, interrupted, or an error. The sinks are closed. What is raised in
    this context goes on."""
    try:
        events.emit("lifecycle.stage", events.start)
        yield
        events.emit("lifecycle.stage", {"stage": "finished"})
    except KeyboardInterrupt as interrupt:
        events.emit("lifecycle.stage", {"stage": "interrupted", "message": str(interrupt)})
        raise
    except UserError as error:
        events.emit("error", {"message": str(error)})
        raise
    except BaseException as error:
        told = "".join(traceback.format_exception(error))
        events.emit("error", {"message": f"{type(error).__name__}: {error}", "traceback": told})
        raise
    finally:
        events.close()


def type_of_values(values: Mapping[str, float]) -> EventType:
    """Whether logged values are the state of the training or an evaluation, by their names."""
    return "training.status" if LOSSES & values.keys() else "evaluation"
