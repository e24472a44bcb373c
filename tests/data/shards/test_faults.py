"""Shards that are missing, cut off or changed are named, before the run or when they are read."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from library import whole_files
from library.data import images
from library.data.shards.check import unpack
from library.data.shards.places import expand
from library.data.shards.table import ShardTable, is_inside, write_table
from library.options.mistakes import UserError
from tests.data.image_files import save
from tests.data.shards.packing import opened, pack, scanned, tool


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    for number in range(6):
        save(tmp_path / "data" / f"im{number}.png", (64, 64), f"dog {number}")
    pack(tmp_path / "data", tmp_path / "packed", limit=15_000)
    return tmp_path / "packed"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3000])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(512))


@pytest.mark.parametrize(
    ("change", "what"), [(Path.unlink, "missing"), (cut, "truncated"), (grow, "changed")]
)  # fmt: skip
def test_a_shard_that_is_not_the_one_of_the_table_is_named_before_the_run(
    packed: Path, change: Callable[[Path], None], what: str
) -> None:
    change(packed / "part-000001.tar")
    (mistake,) = scanned(packed).mistakes
    assert "part-000001.tar" in mistake.what and what in mistake.what and "1 shard of" in mistake.what


def test_a_shard_with_other_bytes_is_named_when_it_is_read(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = scanned(packed).records[2]
    assert record.member is not None
    path = Path(record.member.shard.place)
    data = bytearray(path.read_bytes())
    data[record.member.offset + 40] ^= 1
    path.write_bytes(data)
    assert not scanned(packed).mistakes  # a plan reads no shard
    with pytest.raises(UserError) as raised:
        images.load(record.path, record.size)
    assert "im2.png" in str(raised.value) and "shard was changed" in str(raised.value)
    assert "make_shards.py" in raised.value.mistakes[0].remedy
    code, out = tool(capsys, "--check", packed)
    assert code == 2 and "1 file of 6" in out and "im2.png" in out
    data[record.member.offset + 40] ^= 1
    path.write_bytes(data)
    assert tool(capsys, "--check", packed)[0] == 0
    path.write_bytes(data[: record.member.offset + 10])  # cut off during the run
    with pytest.raises(UserError, match="truncated"):
        images.load(record.path, record.size)


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("UPDATE images SET offset = -5", "damaged"),
        ("UPDATE images SET length = 1e15", "damaged"),
        ("UPDATE images SET shard = 99", "damaged"),
        ("UPDATE images SET mask = 'm.png', mask_shard = 0, mask_offset = 0, mask_length = 1e18", "damaged"),
        ("UPDATE images SET mask = 'm.png', mask_shard = 0, mask_offset = 'x'", "damaged"),
        ("UPDATE images SET name = '../../im.png'", "damaged"),
        ("UPDATE images SET width = 'wide'", "damaged"),
        ("UPDATE images SET width = 3.5", "damaged"),
        ("UPDATE images SET offset = 1.5", "damaged"),
        ("UPDATE images SET caption = x'6162'", "damaged"),
        ("UPDATE images SET profile = x'00'", "damaged"),
        ("UPDATE images SET score = 'high'", "damaged"),
        ("UPDATE images SET score = 9e999", "damaged"),
        ("UPDATE images SET alpha = 'nan 1 2 0'", "damaged"),
        ("UPDATE images SET mask = '../../m.png'", "damaged"),
        ("UPDATE images SET mask = x'61'", "damaged"),
        ("UPDATE images SET mask_content = 'text'", "damaged"),
        ("UPDATE facts SET value = '../../x' WHERE key = 'content'", "damaged"),
        ("DELETE FROM facts", "damaged"),
        ("UPDATE shards SET path = '../../secret.tar'", "outside"),
        ("UPDATE shards SET path = '/etc/passwd'", "outside"),
        ("DROP TABLE images", "damaged"),
        ("PRAGMA user_version = 99", "version 99"),
        ("PRAGMA application_id = 1", "not a table of shards"),
    ],
)
def test_a_table_that_no_tool_made_is_refused(packed: Path, statement: str, what: str) -> None:
    with sqlite3.connect(packed / "shards.sqlite") as database:
        database.execute(statement)
    database.close()
    (mistake,) = scanned(packed).mistakes
    assert what in mistake.what and "shards.sqlite" in mistake.what


def test_a_giant_image_is_left_out_by_its_size_in_the_table(packed: Path) -> None:
    with sqlite3.connect(packed / "shards.sqlite") as database:
        database.execute("UPDATE images SET width = 1000000, height = 1000000 WHERE id = 1")
    database.close()
    found = scanned(packed)
    assert len(found.records) == 5 and "need" in found.bad_images[0][1]


def test_a_table_that_is_missing_says_how_to_make_it(packed: Path) -> None:
    (packed / "shards.sqlite").unlink()
    (mistake,) = scanned(f"{packed}/part-000000.tar").mistakes
    assert "no table" in mistake.what and "make_shards.py" in mistake.remedy


def test_nothing_is_left_of_shards_that_cannot_be_packed(tmp_path: Path) -> None:
    save(tmp_path / "data" / "a.png", caption="fine")
    save(tmp_path / "data" / "b.png")
    (tmp_path / "data" / "b.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"b\.txt"):
        pack(tmp_path / "data", tmp_path / "packed")
    assert not list((tmp_path / "packed").iterdir())


def test_no_giant_caption_is_read_to_be_refused(tmp_path: Path) -> None:
    save(tmp_path / "data" / "a.png", caption="a dog")
    os.truncate(tmp_path / "data" / "a.txt", 300_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"a\.txt is not read: it has more than"):
            pack(tmp_path / "data", tmp_path / "packed")
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


def test_a_full_disk_leaves_no_shards_without_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        save(tmp_path / "data" / f"im{number}.png", (64, 64), "a dog")
    free = [2]

    def flush(descriptor: int) -> None:
        free[0] -= 1
        if free[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(whole_files, "_flush", flush)
    with pytest.raises(UserError, match="No space left"):
        pack(tmp_path / "data", tmp_path / "packed", limit=15_000)
    assert free == [-1] and not list((tmp_path / "packed").iterdir())


def test_images_beside_shards_are_noted(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(packed / "loose.png")
    found = scanned(packed)
    assert len(found.records) == 6 and any("1 image beside the shards not used" in note for note in found.notes)
    folder = packed.parent / "data"
    code, out = tool(capsys, "--input_dir", folder, "--output_dir", folder)
    assert code == 2 and "is the folder of the images" in out and not (folder / "shards.sqlite").exists()


def test_a_mask_is_not_unpacked_outside_of_its_folder(packed: Path, tmp_path: Path) -> None:
    """The name of a mask is in the table, which may be from anywhere."""
    with sqlite3.connect(packed / "shards.sqlite") as database:
        database.execute(
            "UPDATE images SET mask = '../evil.png', mask_shard = shard, mask_offset = offset, mask_length = length, "
            "mask_content = content WHERE id = 1"
        )
    database.close()
    with pytest.raises(UserError, match="impossible name"):
        unpack(opened(packed), tmp_path / "out", tmp_path / "masks")
    assert not (tmp_path / "evil.png").exists()


@pytest.mark.skipif(os.name == "nt", reason="no such names there")
def test_names_that_no_table_may_have_are_left_out_and_all_others_can_be_read(tmp_path: Path) -> None:
    for number in range(19):
        save(tmp_path / "data" / f"im{number}.png", caption="a dog")
    save(tmp_path / "data" / "10:30.png", caption="a clock")
    for name in ("c:drive.png", "up\\..\\down.png"):
        save(tmp_path / "data" / name)
    report = pack(tmp_path / "data", tmp_path / "packed")
    assert sorted(Path(name).name for name in report.bad) == ["c:drive.png", "up\\..\\down.png"]
    found = scanned(tmp_path / "packed")
    assert not found.mistakes and len(found.records) == 20


@pytest.mark.parametrize("name", ["c:x.png", "a/c:x.png", "..\\x.png", "a/../../x.png", "/x.png", "\\\\server\\x.png"])
def test_no_name_leads_elsewhere_on_windows(name: str) -> None:
    assert not is_inside(name) and is_inside("a/10:30.png")


def test_shards_are_not_written_twice(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has shards already"):
        pack(tmp_path / "data", packed)


def test_masks_that_the_shards_do_not_have_are_a_mistake(packed: Path, tmp_path: Path) -> None:
    (mistake,) = scanned(packed, mask_dir=tmp_path / "masks").mistakes
    assert "no masks" in mistake.what
    assert not opened(packed, mask_dir=packed).masks


@pytest.mark.parametrize(
    ("change", "why"),
    [
        # a table that is computed has rows without end, each of them as long as it likes
        (
            "DROP TABLE images; CREATE VIEW images AS WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM "
            "n) SELECT id FROM n",
            "images is no table",
        ),
        ("CREATE TRIGGER t AFTER INSERT ON images BEGIN SELECT 1; END", "t is no table"),
        ("INSERT INTO shards VALUES (0, 'a.tar', 'long')", "is damaged"),
    ],
)
def test_a_table_that_computes_its_rows_is_refused(tmp_path: Path, change: str, why: str) -> None:
    write_table(tmp_path / "t.sqlite", "dog", [], [])
    with contextlib.closing(sqlite3.connect(tmp_path / "t.sqlite")) as database:
        database.executescript(change)
    with pytest.raises(UserError, match=why):
        ShardTable(tmp_path / "t.sqlite")


@pytest.mark.parametrize("text", ["{0..999999}" * 30 + ".tar", "{0..1}" * 60 + ".tar", "{" + "," * 2_000_000 + "}.tar"])
def test_a_pattern_of_too_many_shards_is_refused_before_they_are_listed(text: str) -> None:
    """Found by tests/fuzzing.py, seed 7."""
    with pytest.raises(UserError, match="stands for more than"):
        expand(text)


def test_a_table_with_bytes_that_are_no_text_is_damaged(tmp_path: Path) -> None:
    """Found by tests/fuzzing.py, seed 7."""
    write_table(tmp_path / "t.sqlite", "dog", [], [])
    content = (tmp_path / "t.sqlite").read_bytes()
    (tmp_path / "t.sqlite").write_bytes(content.replace(b"CREATE TABLE shards", b"CREATE TABLE \xff\xfehards"))
    with pytest.raises(UserError, match="is damaged"):
        ShardTable(tmp_path / "t.sqlite")
