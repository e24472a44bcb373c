"""The index: unchanged files are not read again, changed ones are, and its errors never stop a scan."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from library.data.scan import file_contents
from library.data.scan.image_headers import Header
from library.data.scan.index import FILE_NAME, VERSION, Index
from library.data.scan.scan import Scan, scan
from library.options.datasets import CaptionSettings
from tests.data.image_files import dataset, save, subset

ROOT = Path(__file__).resolve().parents[3]
LONG_AGO = 1_600_000_000


def age(folder: Path, seconds: int = LONG_AGO) -> None:
    """Treat all files as old: files modified just before the scan are not stored."""
    for path in folder.rglob("*"):
        os.utime(path, (seconds, seconds))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.jpg", "sub/c.png"):
        save(tmp_path / "x" / name, caption=f"of {name}")
    age(tmp_path / "x")
    return tmp_path / "x"


def counting(function: Callable[..., Any], count: Counter[str]) -> Callable[..., Any]:
    def counted(path: Path, *more: object, **named: object) -> Any:
        count[path.name] += 1
        return function(path, *more, **named)

    return counted


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often each file is opened."""
    count: Counter[str] = Counter()
    for name in ("read_header", "read_caption"):
        monkeypatch.setattr(file_contents, name, counting(getattr(file_contents, name), count))
    return count


def run(folder: Path, index: Path | None) -> Scan:
    return scan([dataset(subset(folder, recursive=True))], index)


ALL = {"a.png": 1, "a.txt": 1, "b.jpg": 1, "b.txt": 1, "c.png": 1, "c.txt": 1}


def test_what_has_not_changed_is_read_once(folder: Path, tmp_path: Path, read: Counter[str]) -> None:
    first = run(folder, tmp_path / "cache" / "deep")
    assert read == ALL
    second = run(folder, tmp_path / "cache" / "deep")
    assert read == ALL and second == first and len(second.records) == 3


def test_without_an_index_all_is_read_each_time(folder: Path, read: Counter[str]) -> None:
    assert run(folder, None) == run(folder, None)
    assert read == dict.fromkeys(ALL, 2)


def test_what_has_changed_is_read_again(folder: Path, tmp_path: Path, read: Counter[str]) -> None:
    run(folder, tmp_path)
    read.clear()
    save(folder / "a.png", (8, 16))
    (folder / "b.txt").write_text("of b.jpx", encoding="utf-8")  # as long as before
    save(folder / "new.png", caption="new")
    (folder / "sub" / "c.png").unlink()
    age(folder, LONG_AGO + 1)
    os.utime(folder / "b.jpg", (LONG_AGO, LONG_AGO))
    found = run(folder, tmp_path)
    assert {record.name: (record.size, record.caption) for record in found.records} == {
        "a.png": ((8, 16), "of a.png"), "b.jpg": ((64, 48), "of b.jpx"), "new.png": ((64, 48), "new"),
    }  # fmt: skip
    assert read == {"a.png": 1, "a.txt": 1, "b.txt": 1, "new.png": 1, "new.txt": 1}


def test_files_of_just_now_are_not_remembered(folder: Path, tmp_path: Path, read: Counter[str]) -> None:
    os.utime(folder / "a.png")
    run(folder, tmp_path)
    run(folder, tmp_path)
    assert read == ALL | {"a.png": 2}


def test_several_datasets_of_one_folder_read_it_once(folder: Path, tmp_path: Path, read: Counter[str]) -> None:
    specs = [dataset(subset(folder, recursive=True), resolution=(side, side)) for side in (64, 128)]
    assert len(scan(specs, tmp_path).records) == 6 and read == ALL
    wild = dataset(subset(folder, recursive=True, captions=CaptionSettings(wildcard=True)))
    scan([wild], tmp_path)
    assert read == {name: 2 if name.endswith(".txt") else 1 for name in ALL}
    read.clear()
    scan([*specs, wild], tmp_path)
    assert not read


def test_a_scan_of_the_top_folder_forgets_nothing_below_it(folder: Path, tmp_path: Path, read: Counter[str]) -> None:
    run(folder, tmp_path)
    scan([dataset(subset(folder))], tmp_path)
    run(folder, tmp_path)
    assert read == ALL


def test_what_is_gone_is_forgotten(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path)
    (folder / "a.png").unlink()
    (folder / "a.txt").unlink()
    run(folder, tmp_path)
    base = sqlite3.connect(tmp_path / FILE_NAME)
    names = [name for table in ("headers", "captions") for (name,) in base.execute(f"SELECT name FROM {table}")]
    base.close()
    assert sorted(names) == ["b.jpg", "b.txt", "c.png", "c.txt"]


def test_captions_of_another_ending_are_not_forgotten(folder: Path, tmp_path: Path, read: Counter[str]) -> None:
    for name in "ab":
        (folder / f"{name}.caption").write_text("other", encoding="utf-8")
    age(folder)
    for _ in range(2):
        run(folder, tmp_path)
        scan([dataset(subset(folder, caption_extensions=(".caption",)))], tmp_path)
    assert read == ALL | {"a.caption": 1, "b.caption": 1}


def damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    if kind == "other":
        path.write_bytes(b"this is no index" * 100)
    elif kind == "short":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "pages":
        path.write_bytes(data[:100] + bytes(len(data) - 100))
    else:
        base = sqlite3.connect(path)
        base.execute("DROP TABLE headers" if kind == "tables" else f"PRAGMA user_version = {VERSION + 1}")
        base.close()


@pytest.mark.parametrize("kind", ["other", "short", "empty", "pages", "tables", "version"])
def test_a_damaged_index_is_made_anew(folder: Path, tmp_path: Path, read: Counter[str], kind: str) -> None:
    first = run(folder, tmp_path)
    damage(tmp_path / FILE_NAME, kind)
    again = run(folder, tmp_path)
    assert again.records == first.records and not again.mistakes
    assert not [note for note in again.notes if "the index in " in note]
    read.clear()
    assert run(folder, tmp_path).records == first.records and not read


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_index_that_cannot_be_made_is_told(folder: Path, tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        (tmp_path / "cache" / FILE_NAME).mkdir(parents=True)
    else:
        (tmp_path / "cache").write_text("", encoding="utf-8")
    found = run(folder, tmp_path / "cache")
    assert len(found.records) == 3 and not found.mistakes
    assert any("the index in " in note and "cannot be used" in note for note in found.notes)


def test_an_index_that_cannot_be_written_is_still_read(
    folder: Path, tmp_path: Path, read: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder, tmp_path / "cache")
    read.clear()
    save(folder / "new.png", caption="new")
    age(folder)
    connect = sqlite3.connect

    def read_only(path: Path, **more: object) -> sqlite3.Connection:
        return connect(f"file:{path}?mode=ro", uri=True, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(sqlite3, "connect", read_only)
    found = run(folder, tmp_path / "cache")
    assert read == {"new.png": 1, "new.txt": 1} and len(found.records) == 4
    assert any("the index in " in note and "cannot be used" in note for note in found.notes)


def test_a_full_disk_costs_the_index_only(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect

    def small(path: Path, **more: object) -> sqlite3.Connection:
        base = connect(path, **more)  # type: ignore[call-overload]
        base.execute("PRAGMA max_page_count = 8")
        return base

    monkeypatch.setattr(sqlite3, "connect", small)
    for index in range(300):
        save(folder / f"{'long ' * 20}{index}.png", (8, 8), caption="words " * 20)
    age(folder)
    found = run(folder, tmp_path / "cache")
    assert len(found.records) == 303 and any("full" in note for note in found.notes)


def test_runs_at_the_same_time_do_no_harm(folder: Path, tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from library.data.scan.image_headers import Header
from library.data.scan.index import Index
me = sys.argv[1]
for turn in range(20):
    with Index(Path({str(tmp_path / "cache")!r})) as index:
        index.store_headers("/folder", [(f"{{me}} {{turn}}.png", (1, 2), Header((3, 4), False))])
        assert not index.trouble, index.trouble
"""
    runs = [subprocess.Popen([sys.executable, "-c", program, str(me)]) for me in range(4)]
    assert [process.wait() for process in runs] == [0] * 4
    names = {f"{me} {turn}.png": (1, 2) for me in range(4) for turn in range(20)}
    with Index(tmp_path / "cache") as index:
        assert index.headers("/folder", names) == dict.fromkeys(names, Header((3, 4), False))


def test_a_scan_that_is_stopped_was_not_in_vain(
    folder: Path, tmp_path: Path, read: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(path: Path, *more: object, **named: object) -> object:
        time.sleep(0.2)  # so that the images are through
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(file_contents, "read_caption", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path)
    read.clear()
    run(folder, tmp_path)
    assert read == {name: 1 for name in ALL if name.endswith(".txt")}
