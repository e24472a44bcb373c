"""The record of a run: what is written, what a reader gets, and what a resumed run takes back."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from library.options.mistakes import Mistake, UserError
from library.training.events.events import Event, Events, EventType, lifecycle, type_of_values
from library.training.events.record import Record, events_of, line_of, read_record, without_superseded
from library.training.saving.state import Progress

NOON = datetime(2026, 5, 17, 12, 0, 0, 250_000, tzinfo=UTC)


def event(type: EventType, step: int, **data: object) -> Event:
    return Event(type, NOON, step, data)


def status(step: int) -> Event:
    return event("training.status", step, loss=step / 2)


def stage(name: str, step: int, run: str = "mine") -> Event:
    return event("lifecycle.stage", step, stage=name, run=run)


def written(path: Path, *events: Event, run: str = "mine", resumed: bool = False) -> None:
    record = Record(path, run, resumed, pytest.fail)
    for each in events:
        record.write(each)
    record.close()


def test_a_line_is_what_docs_events_md_says() -> None:
    summer = Event("notification", NOON.astimezone(timezone(timedelta(hours=2))), 3, {"message": 'a "犬"\n\u2028'})
    line = line_of(summer)
    start = '{"type": "notification", "time": "2026-05-17T12:00:00.250Z", "step": 3, '
    assert line.decode("utf-8") == start + '"data": {"message": "a \\"犬\\"\\n\u2028"}}\n'
    assert events_of(line) == [summer]


def test_numbers_that_json_does_not_have_are_null_and_other_values_are_text() -> None:
    data = {"values": {"a": math.nan, "b": -math.inf, "c": 0.5}, "path": Path("x"), "pair": (1, True), "none": None}
    plain = json.loads(line_of(event("training.status", 1, **data)), parse_constant=pytest.fail)["data"]
    assert plain == {"values": {"a": None, "b": None, "c": 0.5}, "path": "x", "pair": [1, True], "none": None}


def test_file_names_in_other_encodings_are_written() -> None:
    name = os.fsdecode("dög.png".encode("latin-1")) if os.name == "posix" else "d\udcf6g.png"
    assert events_of(line_of(event("validation.image", 1, path=name)))[0].data["path"] == "d?g.png"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "dog-run.jsonl"
    events = [stage("started", 0), status(1), stage("finished", 1)]
    written(path, *events)
    assert read_record(path) == events
    written(path, stage("started", 0), event("error", 0, message="the model holds a NaN"))
    assert read_record(path) == events, "a run that is refused while it loads leaves the record of the run before"
    written(path, stage("started", 0), status(1))
    assert read_record(path) == [stage("started", 0), status(1)], "a new run replaces the record"


@pytest.mark.parametrize("first", [stage("started", 0), status(1)])
def test_a_line_is_in_the_file_before_the_next_event(first: Event, tmp_path: Path) -> None:
    """Also of a run that has only begun: the page can show how it starts."""
    record = Record(tmp_path / "r.jsonl", "mine", False, pytest.fail)
    record.write(first)
    for _ in range(1000):
        if (tmp_path / "r.jsonl").is_file() and read_record(tmp_path / "r.jsonl"):
            break
        threading.Event().wait(0.01)
    assert read_record(tmp_path / "r.jsonl") == [first]
    record.close()


def test_a_run_that_does_nothing_leaves_nothing(tmp_path: Path) -> None:
    """Neither a record nor its folder, unless there is something else in it."""
    refused = [stage("started", 0), event("error", 0, message="the model holds a NaN")]
    written(tmp_path / "new" / "folder" / "r.jsonl", *refused)
    assert not list(tmp_path.iterdir())
    (tmp_path / "old").mkdir()
    written(tmp_path / "old" / "r.jsonl", *refused)
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]
    path = tmp_path / "new" / "r.jsonl"
    record = Record(path, "mine", False, pytest.fail)
    record.write(refused[0])
    while not path.is_file():
        threading.Event().wait(0.01)
    (tmp_path / "new" / "mine.txt").write_bytes(b"")
    record.close()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "damaged",
    [b"{", b'{"type": "notification", "ti', b"\xff\xfe\x00", b"[]", b"null", b'{"type": 1}', b"[" * 10_000]
    + [
        b'{"type": "x", "time": "yesterday", "step": 1, "data": {}}',
        b'{"type": "x", "time": 3, "step": 1, "data": {}}',
        b'{"type": "x", "time": "0001-01-01T00:00:00+14:00", "step": true, "data": {}}',
        b'{"type": "x", "time": "0001-01-01T00:00:00", "step": 1, "data": {}}',
        b'{"type": "x", "time": "2026-05-17T12:00:00Z", "step": 1000000000000000000000, "data": {}}',
    ],
)
def test_damaged_lines_are_left_out(damaged: bytes) -> None:
    good = line_of(status(1))
    assert events_of(good + damaged) == [status(1)]
    assert events_of(damaged + b"\n" + good) == [status(1)]


def test_a_resumed_run_goes_on_after_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    written(path, stage("started", 0), status(1), status(2), status(3))
    path.write_bytes(path.read_bytes()[:-20])
    written(path, stage("resumed", 1), status(2), resumed=True)
    assert read_record(path) == [stage("started", 0), status(1), stage("resumed", 1), status(2)]


@pytest.mark.parametrize("before", [b"", b"no JSON\n", line_of(stage("started", 0, run="another's"))])
def test_a_resumed_run_begins_a_new_record_where_there_is_none_of_its_own(before: bytes, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(before)
    written(path, stage("resumed", 1), status(2), resumed=True)
    assert read_record(path) == [stage("resumed", 1), status(2)]


def test_what_a_resumed_run_takes_back() -> None:
    saved = event("training.checkpoint", 2, path="x")
    cut_off = event("error", 2, message="full")
    before = [stage("started", 0), status(1), status(2), saved, cut_off, status(3), stage("interrupted", 3)]
    after = [stage("resumed", 2), status(3)]
    assert without_superseded([*before, *after]) == [stage("started", 0), status(1), status(2), saved, *after]
    assert without_superseded([*before, stage("started", 0)]) == [stage("started", 0)]


def test_a_file_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "file").write_bytes(b"")
    record = Record(tmp_path / "file" / "r.jsonl", "mine", False, said.append)
    for step in range(100):
        record.write(status(step))
    record.close()
    assert len(said) == 1 and "could not be written" in said[0] and str(tmp_path) in said[0]


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.is_closed = False

    def write(self, event: Event) -> None:
        self.events.append(event)

    def end(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize(
    ("error", "kind", "data"),
    [
        (None, "lifecycle.stage", {"stage": "finished"}),
        (KeyboardInterrupt("saved"), "lifecycle.stage", {"stage": "interrupted", "message": "saved"}),
        (UserError([Mistake("wrong", "mend it")]), "error", {"message": "- wrong\n    -> mend it"}),
    ],
)
def test_a_run_has_a_start_and_an_end(error: BaseException | None, kind: str, data: dict[str, object]) -> None:
    sink = Kept()
    events = Events({"stage": "started"}, [sink], Progress(step=4))
    with contextlib.nullcontext() if error is None else pytest.raises(type(error)), lifecycle(events):
        events.progress = Progress(step=5)
        if error is not None:
            raise error
    first, last = sink.events
    assert (first.type, first.step, first.data) == ("lifecycle.stage", 4, {"stage": "started"})
    assert (last.type, last.step, last.data) == (kind, 5, data) and sink.is_closed


def test_a_fault_is_told_with_its_traceback() -> None:
    sink = Kept()
    with pytest.raises(ZeroDivisionError), lifecycle(Events({}, [sink])):
        print(1 / 0)
    assert sink.events[1].type == "error" and sink.events[1].data["message"] == "ZeroDivisionError: division by zero"
    assert "Traceback" in str(sink.events[1].data["traceback"])


@pytest.mark.parametrize("name", ["loss", "loss/current", "loss/epoch", "loss/epoch_average"])
def test_losses_are_the_state_of_the_training(name: str) -> None:
    assert type_of_values({"lr/unet": 1.0, name: 0.5}) == "training.status"
    assert type_of_values({f"{name}/validation": 0.5}) == "evaluation"
