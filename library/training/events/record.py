"""The record of a run: a file beside the model with one event per line, as JSON in UTF-8.

A resumed run of the same record goes on writing to it. Its first event is a lifecycle.stage "resumed" with its step:
what the run that was cut off wrote about later steps no longer holds, and `without_superseded` leaves it out.
"""

from __future__ import annotations

import json
import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import IO

from library.bounded import json_of
from library.training.events.events import Event

PATIENCE = 10.0  # seconds that the end of a run waits for a slow disk
BEGINNING = ("lifecycle.stage", "notification", "error")
"""Types of events of a run that has not done anything yet."""
MOST_STEPS = 2**53
"""A greater step was written by no run; every program that reads JSON has whole numbers up to here."""


@dataclass
class Record:
    """A sink that writes to `path`. A thread writes, and flushes as soon as it has caught up.

    `run` tells whose record it is: a resumed run goes on with the file of the same run, any other begins a new one. A
    run that is refused while its model is loaded leaves no file, and the record of an earlier run stays: where there is
    one, the new one begins when the run does something, with all events until then; where there is none, it begins at
    once, and is removed if nothing was done. A file that cannot be written is said once; it is no reason to end a run.
    """

    path: Path
    run: str
    resumed: bool
    say: Callable[[str], None]
    _waiting: queue.SimpleQueue[Event | None] = field(default_factory=queue.SimpleQueue, init=False)
    _problem: OSError | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._work, name="record", daemon=True)
        self._thread.start()

    def write(self, event: Event) -> None:
        """Take an event: see events.Sink."""
        self._waiting.put(event)

    def end(self) -> None:
        """Nothing more comes: see events.Sink."""
        self._waiting.put(None)

    def close(self) -> None:
        """Wait until what is left is written, and say whether something could not be."""
        self.end()  # a second time, it changes nothing
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self.say(f"the record {self.path} is incomplete: its disk did not answer for {PATIENCE:g} s")
        elif self._problem is not None:
            self.say(f"the record {self.path} could not be written: {self._problem.strerror or self._problem}")

    def _work(self) -> None:
        waiting = iter(self._waiting.get, None)
        try:
            if not self.path.exists():
                self._write_first(waiting)
            elif begun := self._begun():
                with self._open() as file:
                    self._write(file, chain(begun, waiting))
        except OSError as error:
            self._problem = error
            while self._waiting.get() is not None:
                pass  # what waits for nothing would fill the memory

    def _write_first(self, events: Iterator[Event]) -> None:
        """Write a record where there is none; remove it, and the folders made for it, if the run has done nothing."""
        folders = [folder for folder in self.path.parents if not folder.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "xb") as file:
            has_done = self._write(file, events)
        if not has_done:
            with suppress(OSError):  # another program reads it, or has put something beside it
                self.path.unlink()
                for folder in folders:
                    folder.rmdir()

    def _write(self, file: IO[bytes], events: Iterable[Event]) -> bool:
        """Write events until there are no more. Returns whether the run has done anything."""
        has_done = False
        for event in events:
            has_done = has_done or event.type not in BEGINNING
            file.write(line_of(event))
            if self._waiting.empty():
                file.flush()
        return has_done

    def _begun(self) -> list[Event]:
        """The events up to the first that is more than a beginning; none if the run ends without one."""
        begun: list[Event] = []
        while (event := self._waiting.get()) is not None:
            begun.append(event)
            if event.type not in BEGINNING:
                return begun
        return []

    def _open(self) -> IO[bytes]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not (self.resumed and run_of(self.path) == self.run):
            return open(self.path, "wb")
        file = open(self.path, "r+b")
        file.seek(0, 2)
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":  # the run was cut off within a line
                file.write(b"\n")
        return file


def line_of(event: Event) -> bytes:
    """An event as a line of JSON in UTF-8. Numbers that JSON does not have are null; characters that UTF-8 does not
    have, of file names in other encodings, are question marks."""
    return json.dumps(content_of(event), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"


def content_of(event: Event) -> dict[str, object]:
    """What a line holds."""
    time = event.time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {"type": event.type, "time": time, "step": event.step, "data": plain(event.data)}


def plain(value: object) -> object:
    """A value as JSON has it: infinite numbers and NaN become None, paths and what else there is become text."""
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, bool, int)) else str(value)


def read_record(path: Path) -> list[Event]:
    """The events of a record that still hold, also while a run writes to it. Raises OSError."""
    return without_superseded(events_of(path.read_bytes()))


def events_of(lines: bytes) -> list[Event]:
    """The events in some lines of a record. Lines that are cut off or damaged are left out."""
    return [event for line in lines.split(b"\n") if (event := _event_of(line)) is not None]


def without_superseded(events: Iterable[Event]) -> list[Event]:
    """The events that hold: a resumed run takes back those of later steps, and one that starts all before it."""
    kept: list[Event] = []
    for event in events:
        stage = event.data.get("stage") if event.type == "lifecycle.stage" else None
        if stage == "started":
            kept.clear()
        elif stage == "resumed":
            kept = [earlier for earlier in kept if earlier.step <= event.step and not _is_end(earlier)]
        kept.append(event)
    return kept


def run_of(path: Path) -> str | None:
    """Whose record a file is; None if there is no such file, or no event in its first line."""
    try:
        with open(path, "rb") as file:
            event = _event_of(file.readline())
    except OSError:
        return None
    run = None if event is None else event.data.get("run")
    return run if isinstance(run, str) else None


def _is_end(event: Event) -> bool:
    return event.type == "error" or (event.type == "lifecycle.stage" and event.data.get("stage") in ENDS)


ENDS: Sequence[str] = ("finished", "interrupted")


def _event_of(line: bytes) -> Event | None:
    try:
        content = json_of(line)
        event = Event(content["type"], datetime.fromisoformat(content["time"]), content["step"], content["data"])
        event.time.timestamp()  # raises for a time that no clock shows
    except (ValueError, LookupError, TypeError, OverflowError):
        return None
    is_step = type(event.step) is int and abs(event.step) <= MOST_STEPS
    return event if is_step and isinstance(event.type, str) and isinstance(event.data, dict) else None
