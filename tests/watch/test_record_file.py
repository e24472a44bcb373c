"""Records are read while they are written."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.watch import record_file
from library.watch.record_file import RecordFile
from tests.watch.records import begin, status, write


def steps(record: RecordFile) -> list[int]:
    return [event.step for event in record.new_events()]


def test_only_what_is_new_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, begin(), status(1))
    record = RecordFile(path)
    assert steps(record) == [0, 1] and steps(record) == []
    with path.open("ab") as file:
        file.write(status(2))
    assert not record.was_replaced() and steps(record) == [2]


def test_a_line_is_read_when_it_is_complete(tmp_path: Path) -> None:
    """Cut anywhere, also within a character of two bytes."""
    whole = begin() + status(1) + begin(name="für").replace(b'"step": 0', b'"step": 2')
    for cut in range(1, len(whole)):
        path = write(tmp_path, whole[:cut])
        record = RecordFile(path)
        before = steps(record)
        path.write_bytes(whole)
        assert not record.was_replaced()
        assert before + steps(record) == [0, 1, 2] and record.damaged == 0


def test_a_long_record_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_file, "CHUNK", 7)
    path = write(tmp_path, begin(), *(status(step, loss=0.5) for step in range(1, 20)))
    assert steps(RecordFile(path)) == list(range(20))


def test_a_record_that_is_begun_anew_is_read_from_its_start(tmp_path: Path) -> None:
    record = RecordFile(write(tmp_path, begin(run="a"), status(1), status(2)))
    assert steps(record) == [0, 1, 2]
    for anew in ((begin(run="b"),), (begin(run="c"), *(status(step) for step in range(1, 30)))):
        write(tmp_path, *anew)
        assert record.was_replaced() and steps(record) == list(range(len(anew)))


def test_damaged_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    bad = [b"no JSON\n", b"\xff\xfe\n", b"[1, 2]\n", b'{"type": "error"}\n', b"\x00" * 40 + b"\n", b"\n", b"  \n"]
    record = RecordFile(write(tmp_path, begin(), *bad, status(1)))
    assert steps(record) == [0, 1] and record.damaged == 5


def test_a_record_that_is_gone_raises(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        RecordFile(tmp_path / "gone-run.jsonl").was_replaced()
