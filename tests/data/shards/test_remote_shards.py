"""Shards behind a URL are read in place, by ranges or, with a buffer, by whole copies of a limited number."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from library.data.scan.scan import Scan, scan
from library.data.scan.shard_images import describe_reading
from library.data.shards import copies, remote
from tests.data.image_files import dataset, save, subset
from tests.data.shards.packing import pack, scanned, tool, write_tar

URL = "memory://bucket/set"


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[MemoryFileSystem]:
    """Eight images in four shards with their table."""
    for number in range(8):
        save(tmp_path / "data" / f"im{number}.png", (64, 64), f"dog {number}")
    pack(tmp_path / "data", tmp_path / "packed", limit=30_000)
    system = MemoryFileSystem()
    for path in (tmp_path / "packed").iterdir():
        system.pipe_file(f"/bucket/set/{path.name}", path.read_bytes())
    yield system
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def read_all(found: Scan) -> list[bytes]:
    contents = []
    for record in found.records:
        with record.path.open("rb") as file:
            contents.append(file.read())
    return contents


def scan_url(tmp_path: Path, url: str = URL, copied: int = 0) -> Scan:
    return scan([dataset(subset(None, shards=url, shard_copies=copied))], caches=tmp_path / "caches")


def test_images_behind_a_url_are_those_of_the_shards(
    cloud: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = scanned(tmp_path / "packed")
    found = scan_url(tmp_path)
    assert not found.mistakes, found.mistakes
    assert read_all(found) == read_all(local)
    assert [(one.key, one.caption) for one in found.records] == [(one.key, one.caption) for one in local.records]
    files = [path for path in (tmp_path / "caches").rglob("*") if path.is_file()]
    assert sorted(path.suffix for path in files) == [".json", ".sqlite"]  # of the data, only the table is here
    part = scan_url(tmp_path, f"{URL}/part-{{000000..000001}}.tar")
    assert 0 < len(part.records) < 8
    (note,) = describe_reading(found.shards, 0)
    assert "--shard_buffer" in note and describe_reading(found.shards, 2) == []
    # the table is copied once, and again when it has changed
    copied: list[str] = []
    original = remote.copy_to
    monkeypatch.setattr(remote, "copy_to", lambda url, stream: (copied.append(url), original(url, stream)))
    scan_url(tmp_path)
    assert copied == []
    cloud.pipe_file("/bucket/set/shards.sqlite", (tmp_path / "packed" / "shards.sqlite").read_bytes())
    scan_url(tmp_path)
    assert copied == [f"{URL}/shards.sqlite"]


def test_with_a_buffer_a_limited_number_of_shards_is_copied(
    cloud: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = scanned(tmp_path / "packed")
    assert len({record.member.shard.place for record in local.records if record.member}) == 4
    ranges: list[str] = []
    original = remote.read_range
    monkeypatch.setattr(remote, "read_range", lambda *place: ranges.append(place[0]) or original(*place))
    found = scan_url(tmp_path, copied=2)
    folder = tmp_path / "caches" / "shards"
    (folder / ".x.tar.0123456789ab.dreamfolder-tmp").touch()  # of a process that was killed
    os.utime(folder / ".x.tar.0123456789ab.dreamfolder-tmp", (0, 0))
    assert read_all(found) == read_all(local) and not ranges  # not one request for a single image
    assert not list(folder.glob(".*"))
    assert len(list(folder.glob("*.tar"))) == 2 and not list(folder.glob("*.lock"))
    # while another process copies a shard, its images are read by request
    monkeypatch.setattr(copies.Copies, "_make_room", lambda self: pytest.fail("it is the other one's turn"))
    for path in folder.glob("*.tar"):
        path.with_name(path.name + ".lock").touch()
        path.unlink()
    with found.records[-1].path.open("rb") as file:  # of one of the two shards that were read last
        assert file.read() == read_all(local)[-1]
    assert len(ranges) == 1


def test_copies_of_earlier_shards_are_not_used_and_none_are_needed(
    cloud: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_all(scan_url(tmp_path, copied=8))
    for number in range(8):
        save(tmp_path / "data" / f"im{number}.png", (80, 64), f"cat {number}")
    pack(tmp_path / "data", tmp_path / "new", limit=30_000)
    cloud.rm("/bucket", recursive=True)
    for path in (tmp_path / "new").iterdir():
        cloud.pipe_file(f"/bucket/set/{path.name}", path.read_bytes())
    expected = read_all(scanned(tmp_path / "new"))
    assert read_all(scan_url(tmp_path, copied=8)) == expected

    asked: list[object] = []

    def full(url: str, _: object) -> None:
        asked.append(url)
        raise OSError(errno.ENOSPC, "No space left on device")

    shutil.rmtree(tmp_path / "caches")
    found = scan_url(tmp_path, copied=8)
    monkeypatch.setattr(remote, "copy_to", full)
    assert read_all(found) == expected and not list((tmp_path / "caches").rglob("*.tar*"))
    assert len(asked) == 1  # not again for each image
    monkeypatch.setattr(copies, "_PAUSE", 0.0)
    assert read_all(found) == expected and len(asked) > 1


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda cloud: cloud.rm("/bucket/set/part-000001.tar"), "part-000001.tar: it is missing"),
        (lambda cloud: cloud.pipe_file("/bucket/set/part-000001.tar", b"short"), "it is truncated (5 of "),
        (lambda cloud: cloud.rm("/bucket/set/shards.sqlite"), "there is no table of shards"),
        (lambda cloud: cloud.pipe_file("/bucket/set/shards.sqlite", b"no table"), "is damaged"),
    ],
)
def test_what_is_wrong_behind_a_url_is_named(
    cloud: MemoryFileSystem, tmp_path: Path, change: object, what: str
) -> None:
    change(cloud)  # type: ignore[operator]
    (mistake,) = scan_url(tmp_path).mistakes
    assert what in mistake.what


def test_a_range_that_cannot_be_read_is_an_error_of_the_file(cloud: MemoryFileSystem, tmp_path: Path) -> None:
    record = scan_url(tmp_path).records[0]
    cloud.rm("/bucket", recursive=True)
    with pytest.raises(OSError, match="part-000000"):
        record.path.open("rb")


def test_shards_of_others_behind_a_url_get_a_local_table(
    cloud: MemoryFileSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = (tmp_path / "data" / "im0.png").read_bytes()
    cloud.pipe_file("/other/a-0.tar", write_tar(tmp_path / "a.tar", {"1.png": image, "1.txt": b"x"}).read_bytes())
    code, out = tool(capsys, "--shards", "memory://other/a-{0..0}.tar")
    assert code == 2 and "--output_dir" in out
    code, out = tool(capsys, "--shards", "memory://other/a-{0..0}.tar", "--output_dir", tmp_path / "tables")
    assert code == 0, out
    table = str(tmp_path / "tables" / "shards.sqlite")
    found = scan(
        [dataset(subset(None, shards="memory://other/a-{0..0}.tar", shard_table=table))], caches=tmp_path / "caches"
    )
    assert not found.mistakes and read_all(found) == [image]


def test_no_password_of_a_url_is_told(
    cloud: MemoryFileSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud.pipe_file("/me:hush@bucket/a.tar", write_tar(tmp_path / "a.tar", {"1.png": b"none"}).read_bytes()[:-9000])
    code, out = tool(capsys, "--shards", "memory://me:hush@bucket/a.tar", "--output_dir", tmp_path / "tables")
    assert code == 2 and "memory://bucket/a.tar" in out and "hush" not in out
    for path in (tmp_path / "packed").iterdir():
        cloud.pipe_file(f"/me:hush@bucket/set/{path.name}", path.read_bytes())
    found = scan_url(tmp_path, "memory://me:hush@bucket/set")
    assert found.subsets[0].source == URL and str(found.records[0].path) == f"{URL}/part-000000.tar/im0.png"
    assert "hush" not in "".join(describe_reading(found.shards, 0)) and read_all(found)
    (mistake,) = scan_url(tmp_path, "memory://me:hush@bucket/set/other.tar").mistakes
    assert "not in the table memory://bucket/set" in mistake.what
