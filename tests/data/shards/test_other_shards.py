"""Shards that other programs wrote: their table is made without writing them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from library.data.shards.archive import Skipped, files_in
from library.data.shards.places import expand, locate
from library.options.mistakes import UserError
from tests.data.shards.packing import png, scanned, tool, write_tar


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards as img2dataset writes them: 0001.jpg with .txt and .json."""
    for shard in range(2):
        files: dict[str, bytes] = {}
        for number in range(3):
            key = f"{number:04d}"
            files[f"{key}.png"] = png((64, 48), seed=10 * shard + number)
            if number:
                files[f"{key}.txt"] = f"text {shard} {number}".encode()
            files[f"{key}.json"] = json.dumps({"caption": f"json {shard} {number}", "width": 9}).encode()
        write_tar(tmp_path / "data" / f"train-{shard:05d}.tar", files)
    return tmp_path / "data"


def test_a_pattern_reads_shards_that_others_wrote(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    pattern = f"{shards}/train-{{00000..00001}}.tar"
    code, out = tool(capsys, "--shards", pattern)
    assert code == 0, out
    assert {name: (shards / name).read_bytes() for name in before} == before
    found = scanned(pattern)
    assert not found.mistakes, found.mistakes
    captions = {record.name: record.caption for record in found.records}
    assert captions == {
        f"train-{shard:05d}/{number:04d}.png": f"{'text' if number else 'json'} {shard} {number}"
        for shard in range(2)
        for number in range(3)
    }
    assert [record.size for record in found.records] == [(64, 48)] * 6
    # some of them
    assert len(scanned(f"{shards}/train-00001.tar").records) == 3
    # a table that is elsewhere
    code, out = tool(capsys, "--shards", shards, "--output_dir", shards.parent / "tables")
    assert code == 0, out
    (shards / "shards.sqlite").unlink()
    elsewhere = scanned(pattern, shard_table=str(shards.parent / "tables" / "shards.sqlite"))
    assert [(one.name, one.caption) for one in elsewhere.records] == [(r.name, r.caption) for r in found.records]


def test_what_is_in_a_shard_beside_images_is_counted_and_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "./a.png": png(seed=1), "./a.depth.png": png(seed=2), "a.mask.png": png(mode="L"), "a.txt": b"one",
        "../../evil.png": png(seed=3), "/etc/evil.png": png(seed=4), "c:evil.png": png(seed=5),
        "photo.v2.png": png(seed=6), "photo.v2.txt": b"two", "a.png": png(seed=7),
        "bad.png": b"no image", "no\udcffunicode.png": png(seed=8), "many1.json": b'{"caption": "half \\ud800"}',
         **{f"many{number}.png": png(seed=number) for number in range(20)},
    }  # fmt: skip
    write_tar(tmp_path / "x.tar", files, links={"link.png": "/etc/passwd"})
    code, out = tool(capsys, "--shards", tmp_path / "x.tar")
    assert code == 0, out
    assert "1 x link or device" in out and "4 x file named outside of the archive" in out
    assert "1 x second image of a sample" in out and "bad.png (unknown image format)" in out
    assert "1 x second file of one name" in out and "22 images in 1 shard" in out
    records = {record.name: record for record in scanned(tmp_path, mask_dir=tmp_path).records}
    assert records.keys() == {"x/a.png", "x/photo.v2.png", *(f"x/many{number}.png" for number in range(20))}
    assert records["x/photo.v2.png"].caption == "two" and records["x/a.png"].caption == "one"
    with records["x/a.png"].path.open("rb") as file:  # of two files with one name, the first
        assert file.read() == files["./a.png"]
    assert records["x/many1.png"].caption == "half ?"
    mask = records["x/a.png"].mask_member
    assert mask is not None and mask.open("rb").read() == files["a.mask.png"]


def header_of_giant(kind: bytes) -> bytes:
    """The header of a file of 2**60 bytes."""
    info = tarfile.TarInfo("a.png")
    info.type, info.size = kind, 1 << 60
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"no archive at all" * 100, "not a complete uncompressed tar"),
        (None, "unexpected end of data"),
        (header_of_giant(tarfile.REGTYPE) + bytes(2000), "unexpected end of data"),
        (header_of_giant(tarfile.XHDTYPE) + bytes(2000), "not a complete uncompressed tar"),
        (header_of_giant(tarfile.GNUTYPE_LONGNAME) + bytes(2000), "not a complete uncompressed tar"),
    ],
)
def test_a_damaged_archive_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes | None, what: str
) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.png": png((200, 200))})
    path.write_bytes(path.read_bytes()[:2000] if data is None else data)
    code, out = tool(capsys, "--shards", path)
    assert code == 2 and what in out and "x.tar" in out and not (tmp_path / "shards.sqlite").exists()


def test_endings_of_any_case_are_those_of_a_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in a folder."""
    files = {
        "a.PNG": png(),
        "a.TXT": b"one",
        "b.png": png(),
        "b.JSON": b'{"caption": "two"}',
        "a.Mask.PNG": png(mode="L"),
    }
    write_tar(tmp_path / "x.tar", files)
    code, out = tool(capsys, "--shards", tmp_path / "x.tar")
    assert code == 0 and "without a caption" not in out, out
    found = [(record.caption, record.mask) for record in scanned(tmp_path, mask_dir=tmp_path).records]
    assert found == [("one", "a.Mask.PNG"), ("two", None)]


def archive() -> tuple[bytearray, int]:
    """Three images of one block each, and where the header of the second is."""
    file = io.BytesIO()
    with tarfile.TarFile(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "c"}) as tar:
        for name in ("a.png", "b.png", "c.png"):
            info = tarfile.TarInfo(name)
            info.size = 512
            tar.addfile(info, io.BytesIO(bytes(512)))
    data = bytearray(file.getvalue())
    return data, data.index(b"b.png")


def with_size(size: bytes) -> bytes:
    """The archive, with this as the size of the second image."""
    data, second = archive()
    header = data[second : second + 512]
    header[124:136], header[148:156] = size, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[second : second + 512] = header
    return bytes(data)


def with_damage() -> bytes:
    data, second = archive()
    data[second + 100] ^= 1
    return bytes(data)


def cut_off(rest: int) -> bytes:
    data, second = archive()
    return bytes(data[: second + rest])


@pytest.mark.parametrize(
    "data",
    [
        with_damage(),
        cut_off(0),
        cut_off(100),
        with_size(b"\xff" * 10 + b"\xfe\x00"),  # the same image again, without end
        with_size(b"\x80" + b"\x7f" * 11),
        with_size(b"\x80" + b"\x00" * 3 + b"\x7f" * 8),
    ],
    ids=["damaged header", "cut off", "cut off in a header", "negative size", "giant size", "large size"],
)
def test_no_image_is_lost_by_a_damaged_archive(tmp_path: Path, data: bytes) -> None:
    """tarfile takes most of these for the end of the archive, as if the other images had never been there."""
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"x\.tar is not a complete uncompressed tar"):
        for place, _ in enumerate(files_in(str(tmp_path / "x.tar"), [".png"], [".txt"], Skipped())):
            assert place < 3
    (tmp_path / "x.tar").write_bytes(bytes(archive()[0]))
    assert len(list(files_in(str(tmp_path / "x.tar"), [".png"], [".txt"], Skipped()))) == 3


def test_patterns_are_those_of_webdataset() -> None:
    assert expand("a-{0008..0011}.tar") == ["a-0008.tar", "a-0009.tar", "a-0010.tar", "a-0011.tar"]
    assert expand("{a,b}-{0..1}.tar::c.tar") == ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar", "c.tar"]
    places = locate("s3://bucket/set/train-{00..01}.tar")
    assert (places.root, places.names) == ("s3://bucket/set", ("train-00.tar", "train-01.tar"))
    assert places.table == "s3://bucket/set/shards.sqlite"
    chained = locate("simplecache::s3://bucket/set/a.tar")
    assert (chained.root, chained.names) == ("simplecache::s3://bucket/set", ("a.tar",))
    split = locate("s3://bucket/a/x.tar::s3://bucket/b/y.tar")
    assert (split.root, split.names) == ("s3://bucket", ("a/x.tar", "b/y.tar"))


@pytest.mark.parametrize("text", ["x-{0..999999999999}.tar", "{0..999}{0..999}{0..9}.tar", "x.tar.gz"])
def test_patterns_that_cannot_be_read_are_refused_at_once(text: str) -> None:
    with pytest.raises(UserError):
        locate(text)
