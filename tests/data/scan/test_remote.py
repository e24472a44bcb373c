"""The mirror equals the remote folder, and nothing is downloaded twice."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

import boto3
import fsspec
import pytest
import s3fs
from fsspec.implementations.memory import MemoryFileSystem

from library import whole_files
from library.data.scan.remote import local_copy, local_names
from library.options.convert_values import is_remote
from library.options.mistakes import UserError

URL = "memory://bucket/data"
FILES = {
    "10_sks dog/a.png": b"an image",
    "10_sks dog/a.txt": b"a dog, on a sofa\n",
    "10_sks dog/Ёлка 犬 🐕.jpg": b"another",
    "1_dog/deep/er/b.png": b"",
    "meta.json": b"{}",
}


class Store:
    """A writable remote folder that records its downloads."""

    def __init__(self, url: str, write: Callable[[str, bytes], None], delete: Callable[[str], None]) -> None:
        self.url, self.write, self.delete = url, write, delete
        self.fetched: list[str] = []

    def copy(self, cache: Path, threads: int = 8) -> Path:
        self.fetched.clear()
        return local_copy(self.url, cache, progress=False, threads=threads)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    system = MemoryFileSystem()
    store = Store(URL, lambda name, raw: system.pipe_file(f"/bucket/data/{name}", raw), lambda name: system.rm_file(
        f"/bucket/data/{name}"))  # fmt: skip
    original = MemoryFileSystem.cat_file

    def cat_file(self: Any, path: str, *rest: Any, **options: Any) -> bytes:
        store.fetched.append(path.removeprefix("/bucket/data/"))
        return bytes(original(self, path, *rest, **options))

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    for name, raw in FILES.items():
        store.write(name, raw)
    yield store
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def s3(account: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    client = boto3.client("s3", endpoint_url=account)
    client.create_bucket(Bucket="bucket")
    store = Store(
        "s3://bucket/data",
        lambda name, raw: client.put_object(Bucket="bucket", Key=f"data/{name}", Body=raw),
        lambda name: client.delete_object(Bucket="bucket", Key=f"data/{name}"),
    )
    original = s3fs.S3FileSystem._cat_file

    async def cat_file(self: Any, path: str, *rest: Any, **options: Any) -> bytes:
        store.fetched.append(path.removeprefix("bucket/data/"))
        return bytes(await original(self, path, *rest, **options))

    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", cat_file)
    client.put_object(Bucket="bucket", Key="data/", Body=b"")  # as the web console marks a folder
    client.put_object(Bucket="bucket", Key="data 2/x.png", Body=b"of another folder")
    for name, raw in FILES.items():
        store.write(name, raw)
    yield store
    everything = client.list_objects_v2(Bucket="bucket").get("Contents", [])
    for found in everything:
        client.delete_object(Bucket="bucket", Key=found["Key"])
    client.delete_bucket(Bucket="bucket")


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    chosen = request.getfixturevalue(request.param)
    assert isinstance(chosen, Store)
    return chosen


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.mark.parametrize(
    ("text", "remote"),
    [
        ("s3://bucket/data", True),
        ("gs://bucket", True),
        ("memory://", True),
        ("file:///data", True),
        ("simplecache::s3://bucket/data", True),
        ("github://owner:repo@main/data", True),
        ("/data/s3", False),
        ("data", False),
        (r"C:\data", False),
        ("C:/data", False),
        ("C://data", False),
        (r"\\server\share", False),
        ("10_sks dog: a://b", False),
        ("", False),
    ],
)
def test_a_url_is_told_from_a_path(text: str, remote: bool) -> None:
    assert is_remote(text) is remote


def test_the_mirror_holds_what_the_folder_holds(store: Store, tmp_path: Path) -> None:
    folder = store.copy(tmp_path)
    assert content(folder) == FILES
    assert folder.name == "data" and tmp_path in folder.parents
    assert sorted(store.fetched) == sorted(FILES)


def test_nothing_is_fetched_when_nothing_changed(store: Store, tmp_path: Path) -> None:
    folder = store.copy(tmp_path)
    before = [(path, path.stat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))]
    assert store.copy(tmp_path) == folder
    assert store.fetched == []
    assert [(path, path.stat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))] == before


def test_only_what_changed_is_fetched(store: Store, tmp_path: Path) -> None:
    folder = store.copy(tmp_path)
    store.write("10_sks dog/a.txt", b"a cat, on a sofa\n")  # of the same length
    store.write("10_sks dog/new.png", b"new")
    store.delete("1_dog/deep/er/b.png")
    store.delete("meta.json")
    store.copy(tmp_path)
    assert sorted(store.fetched) == ["10_sks dog/a.txt", "10_sks dog/new.png"]
    assert content(folder) == {
        "10_sks dog/a.png": b"an image",
        "10_sks dog/a.txt": b"a cat, on a sofa\n",
        "10_sks dog/new.png": b"new",
        "10_sks dog/Ёлка 犬 🐕.jpg": b"another",
    }
    assert sorted(path.name for path in folder.iterdir()) == ["10_sks dog"]  # no empty folder is left
    store.copy(tmp_path)
    assert store.fetched == []


def test_a_copy_that_was_touched_is_fetched_again(memory: Store, tmp_path: Path) -> None:
    folder = memory.copy(tmp_path)
    (folder / "10_sks dog" / "a.png").write_bytes(b"something")  # nine bytes like the original
    os.utime(folder / "10_sks dog" / "a.png", ns=(1, 1))
    (folder / "meta.json").unlink()
    memory.copy(tmp_path)
    assert sorted(memory.fetched) == ["10_sks dog/a.png", "meta.json"] and content(folder) == FILES


def test_files_of_this_machine_stay_in_the_mirror(memory: Store, tmp_path: Path) -> None:
    folder = memory.copy(tmp_path)
    latents = folder / "1_dog" / "deep" / "er" / "b_0064x0064_sd.npz"
    latents.write_bytes(b"latents")
    memory.delete("1_dog/deep/er/b.png")
    memory.copy(tmp_path)
    assert latents.read_bytes() == b"latents" and not latents.with_name("b.png").exists()


def test_two_urls_are_two_mirrors(memory: Store, tmp_path: Path) -> None:
    MemoryFileSystem().pipe_file("/other/data/x.png", b"x")
    folder = memory.copy(tmp_path)
    other = local_copy("memory://other/data", tmp_path, progress=False)
    assert content(other) == {"x.png": b"x"} and content(folder) == FILES
    assert local_copy(f"{URL}/", tmp_path, progress=False) == folder


def test_an_interrupted_copy_goes_on_where_it_was(
    memory: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MemoryFileSystem.cat_file

    def fails(self: Any, path: str, *rest: Any, **options: Any) -> bytes:
        if len(memory.fetched) == 3:
            raise ConnectionError("the line is dead")
        return bytes(original(self, path, *rest, **options))

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "cat_file", fails)
        with pytest.raises(UserError, match=r"bucket/data cannot be read \(ConnectionError: the line is dead\)"):
            memory.copy(tmp_path, threads=1)
    first = list(memory.fetched)
    assert len(first) == 3
    (journal,) = tmp_path.rglob("*.jsonl")
    with journal.open("a", encoding="utf-8") as stream:
        stream.write('["10_sks dog/a.t')  # the power went while it was written
    folder = memory.copy(tmp_path)
    assert sorted(first + memory.fetched) == sorted(FILES) and content(folder) == FILES
    assert memory.copy(tmp_path) == folder and memory.fetched == []


def test_another_copy_at_the_same_time_does_no_harm(
    memory: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MemoryFileSystem.cat_file

    def meanwhile(self: Any, path: str, *rest: Any, **options: Any) -> bytes:
        if not memory.fetched:
            memory.fetched.append("")
            local_copy(URL, tmp_path, progress=False)
        return bytes(original(self, path, *rest, **options))

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "cat_file", meanwhile)
        folder = memory.copy(tmp_path)
    assert content(folder) == FILES
    memory.copy(tmp_path)
    assert memory.fetched == [] and content(folder) == FILES


@pytest.mark.parametrize("spoil", [b"", b"\xff\x00{", b"[1, 2]\n{}\nnull\n"], ids=["empty", "bytes", "other lines"])
def test_a_damaged_journal_costs_only_time(memory: Store, tmp_path: Path, spoil: bytes) -> None:
    folder = memory.copy(tmp_path)
    (journal,) = tmp_path.rglob("*.jsonl")
    journal.write_bytes(spoil)
    memory.copy(tmp_path)
    assert sorted(memory.fetched) == sorted(FILES) and content(folder) == FILES
    memory.copy(tmp_path)
    assert memory.fetched == []


def test_a_file_that_changes_while_it_is_fetched_is_said(
    memory: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda self, path: b"much longer than the listing said")
    with pytest.raises(UserError, match=r"changed while memory://bucket/data was being copied\n.*start again"):
        memory.copy(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".png", ".dreamfolder-tmp")]


def test_names_that_windows_refuses_get_others() -> None:
    names = [
        'a: "b" <c>|?*.png', "a\\b.png", "CON.png", "con", "Lpt1.tags.txt", "end.", "end ", "x/../y.png", "x//y.png",
        "tab\t.png", "100%.png", "a%3A.png", "nul/x.png", "console.png", f"{'long' * 60}.png", f"{'犬' * 200}.txt",
        "dir. /x.png", ".hidden", "..", "plain.png", "Ёлка 犬 🐕.png",
    ]  # fmt: skip
    found = local_names(names)
    assert found["plain.png"] == "plain.png" and found["Ёлка 犬 🐕.png"] == "Ёлка 犬 🐕.png"
    assert found["100%.png"] == "100%.png" and found["a%3A.png"] == "a%253A.png"
    assert found['a: "b" <c>|?*.png'] == "a%3A %22b%22 %3Cc%3E%7C%3F%2A.png" and found["console.png"] == "console.png"
    assert len(set(found.values())) == len(names) and list(found) == sorted(names)
    for name in found.values():
        for part in name.split("/"):
            assert part and not re.search(r'[\x00-\x1f<>:"\\|?*]', part) and not part.endswith((".", " ")), name
            assert not PureWindowsPath(part).is_reserved() and len(part.encode()) <= 200, name


def test_names_that_differ_in_case_only_are_kept_apart_with_their_captions() -> None:
    names = ["A.png", "A.txt", "a.png", "a.txt", "a/x.png", "b.png", "B.txt", "é.png", "e\u0301.png", "c", "c/d", "c~2"]
    found = local_names(names)
    assert len({value.casefold() for value in found.values()}) == len(names)
    assert [found[name] for name in ("A.png", "A.txt", "a.png", "a.txt")] == ["A.png", "A.txt", "a~2.png", "a~2.txt"]
    assert found["a/x.png"] == "a/x.png"
    # a caption of another spelling was never this image's
    assert Path(found["b.png"]).stem != Path(found["B.txt"]).stem
    assert found["c"] != found["c/d"].split("/")[0]


def test_what_cannot_be_a_file_name_is_mirrored_all_the_same(memory: Store, tmp_path: Path) -> None:
    memory.write("10_dog/what?.png", b"1")
    memory.write("10_dog/What?.png", b"2")
    memory.write("10_dog/" + "x" * 300 + ".png", b"3")
    folder = memory.copy(tmp_path)
    made = content(folder / "10_dog")
    assert made["What%3F.png"] == b"2" and made["what%3F~2.png"] == b"1" and b"3" in made.values()
    memory.copy(tmp_path)
    assert memory.fetched == []


def test_a_file_url_is_the_folder_itself(tmp_path: Path) -> None:
    (tmp_path / "my data").mkdir()
    cache = tmp_path / "cache"
    url = (tmp_path / "my data").as_uri().replace("%20", " ")
    assert local_copy(url, cache, progress=False) == tmp_path / "my data"
    assert not cache.exists()
    with pytest.raises(UserError, match="there is no folder"):
        local_copy(f"{url}/none", cache, progress=False)


def refused(url: str, cache: Path) -> str:
    with pytest.raises(UserError) as caught:
        local_copy(url, cache, progress=False)
    assert len(caught.value.mistakes) == 1 and caught.value.mistakes[0].remedy
    assert not [path for path in cache.rglob("*") if path.is_file()]
    return str(caught.value)


def test_a_folder_that_is_not_there_is_said_and_the_mirror_stays(store: Store, tmp_path: Path) -> None:
    folder = store.copy(tmp_path)
    with pytest.raises(UserError, match="/none: no such folder, or it is empty"):
        local_copy(f"{store.url}/none", tmp_path, progress=False)
    for name in FILES:
        store.delete(name)
    with pytest.raises(UserError, match="no such folder, or it is empty"):
        store.copy(tmp_path)
    assert content(folder) == FILES


def test_a_file_is_no_folder(memory: Store, tmp_path: Path) -> None:
    assert "meta.json is a file" in refused(f"{URL}/meta.json", tmp_path / "cache")


def test_a_missing_bucket_is_said(account: str, tmp_path: Path) -> None:
    said = refused("s3://nobody-has-this/data", tmp_path)
    assert "s3://nobody-has-this/data: no such" in said and "check the URL" in said


def test_missing_credentials_are_said(account: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    said = refused("s3://bucket/data", tmp_path)
    assert "s3://bucket/data: no credentials found" in said and "AWS_ACCESS_KEY_ID" in said


def test_a_server_that_is_off_is_said(account: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    said = refused("s3://bucket/data", tmp_path)
    assert "s3://bucket/data cannot be read" in said and "check URL and network" in said


def test_a_refused_access_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "find", forbidden)
    assert "memory://bucket/data: access denied (Access Denied)" in refused(URL, tmp_path)


@pytest.mark.parametrize(
    ("url", "module", "remedy"),
    [
        ("s3://bucket/data", "s3fs", f"pip install s3fs=={fsspec.__version__}"),
        ("gs://bucket/data", "gcsfs", f"pip install gcsfs=={fsspec.__version__}"),
        ("sftp://host/data", "paramiko", "pip install paramiko"),
    ],
)
def test_a_missing_package_is_named(
    url: str, module: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url.partition(":")[0], raising=False)
    said = refused(url, tmp_path)
    assert f"{url} needs the package {module}, which is not installed" in said and remedy in said


def test_fsspec_itself_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    assert "needs the package fsspec" in refused(URL, tmp_path)


def test_an_unknown_kind_of_storage_is_said(tmp_path: Path) -> None:
    assert "s33://bucket: s33 is not a protocol of fsspec" in refused("s33://bucket", tmp_path)


def test_a_password_is_not_shown(tmp_path: Path) -> None:
    said = refused("memory://me:secret@bucket/none?sig=hidden", tmp_path)
    assert "memory://bucket/none" in said and "secret" not in said and "hidden" not in said


def test_a_cache_that_cannot_be_written_is_said(memory: Store, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(UserError, match=r"copy .* cannot be written"):
        memory.copy(tmp_path / "cache")


def test_a_full_disk_is_said_and_what_was_fetched_is_kept(
    memory: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, left = os.fsync, [2]

    def full(descriptor: int) -> None:
        if not left[0]:
            raise OSError(28, "No space left on device")
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(whole_files, "flush_folder", lambda folder: left.__setitem__(0, left[0] - 1))
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot be written .*No space left.*\n.*downloaded files are kept"):
            memory.copy(tmp_path, threads=1)
    assert not list(tmp_path.rglob("*.dreamfolder-tmp"))
    folder = memory.copy(tmp_path)
    assert len(memory.fetched) == 3 and content(folder) == FILES


def test_the_journal_is_text_that_tells_what_is_there(memory: Store, tmp_path: Path) -> None:
    memory.copy(tmp_path)
    (journal,) = tmp_path.rglob("*.jsonl")
    lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    assert [line[0] for line in lines] == sorted(FILES)
