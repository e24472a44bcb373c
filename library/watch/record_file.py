"""Read a record that a run is writing: only what is new, only whole lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from library.training.events.events import Event
from library.training.events.record import events_of

CHUNK = 1 << 22  # bytes read at once


@dataclass
class RecordFile:
    """A record (library/training/events/record.py) that grows. `damaged`: lines that hold no event.

    The file is open only while it is read: Windows lets nobody replace an open one.
    """

    path: Path
    damaged: int = 0
    _offset: int = 0
    _first: bytes = b""  # how the file began when it was read

    def was_replaced(self) -> bool:
        """Whether another run has begun the file anew; it is then read from its start. Raises OSError."""
        with self.path.open("rb") as stream:
            is_same = stream.read(len(self._first)) == self._first and stream.seek(0, 2) >= self._offset
        if not is_same:
            self._offset, self._first, self.damaged = 0, b"", 0
        return not is_same

    def new_events(self) -> Iterator[Event]:
        """The events of the lines that were completed since the last call. Raises OSError."""
        with self.path.open("rb") as stream:
            stream.seek(self._offset)
            rest = b""
            while chunk := stream.read(CHUNK):
                whole, newline, rest = (rest + chunk).rpartition(b"\n")
                events = events_of(whole)
                self._first = self._first or whole.partition(b"\n")[0]
                self._offset += len(whole + newline)
                self.damaged += sum(not line.isspace() for line in whole.split(b"\n") if line) - len(events)
                yield from events
