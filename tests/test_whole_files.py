"""A file or folder is there whole or not at all, and what a process that was killed left of one is cleared away."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from library import whole_files
from library.whole_files import is_temporary, remove_leftovers, replacing, replacing_folder, write_text

ROOT = Path(__file__).resolve().parent.parent
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX has locks of files that anybody may remove")


def put_folder(path: Path, text: str) -> None:
    with replacing_folder(path) as folder:
        write_text(folder / "a.txt", text)
        write_text(folder / "inner" / "b.txt", text)


def content(path: Path) -> dict[str, str]:
    return {each.relative_to(path).as_posix(): each.read_text("utf-8") for each in path.rglob("*") if each.is_file()}


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    for name in ("a" * 255, "犬" * 80, "x.safetensors"):
        write_text(tmp_path / "new" / name, "x")
    assert sorted(map(len, os.listdir(tmp_path / "new"))) == [13, 80, 255]
    assert not any(map(is_temporary, os.listdir(tmp_path / "new")))


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model"
    put_folder(path, "one")
    put_folder(path, "two")
    assert content(path) == {"a.txt": "two", "inner/b.txt": "two"}
    with pytest.raises(KeyError), replacing_folder(path) as folder:
        write_text(folder / "a.txt", "half")
        raise KeyError
    assert content(path) == {"a.txt": "two", "inner/b.txt": "two"} and os.listdir(path.parent) == ["model"]


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), KeyboardInterrupt()], ids=repr)
def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    put_folder(tmp_path / "model", "old")
    place = os.replace

    def refuse(source: str, target: str) -> None:
        if Path(target) == tmp_path / "model" and str(source).endswith("tmp"):
            raise error
        place(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(whole_files, "_APART", 0.0)
    with pytest.raises(type(error)):
        put_folder(tmp_path / "model", "new")
    assert content(tmp_path / "model")["a.txt"] == "old" and os.listdir(tmp_path) == ["model"]


# Begins files and folders, and is killed in the middle: argv[1] is the folder, argv[2] what to be killed at.
_KILLED = """
import os, signal, sys
from pathlib import Path
from library.whole_files import replacing, replacing_folder, write_text
folder, moment = Path(sys.argv[1]), sys.argv[2]
place = os.replace

def counted(source, target):
    name = os.path.basename(target)
    if moment == "before the new folder" and name == "model" and str(source).endswith("tmp"):
        os.kill(os.getpid(), 9)
    place(source, target)
    if moment == "before the old one is removed" and name == "model" and str(source).endswith("tmp"):
        os.kill(os.getpid(), 9)

os.replace = counted
if moment == "in the middle":
    with replacing(folder / "file") as stream, replacing_folder(folder / "model") as building:
        stream.write(b"half")
        stream.flush()
        write_text(building / "a.txt", "half")
        print("ready", flush=True)
        sys.stdin.read()
        os.kill(os.getpid(), 9)
with replacing_folder(folder / "model") as building:
    write_text(building / "a.txt", "new")
"""


def begin(folder: Path, moment: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", _KILLED, str(folder), moment]
    return subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@posix
def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    (tmp_path / ".file.mine.tmp").touch()
    process = begin(tmp_path, "in the middle")
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    before = sorted(os.listdir(tmp_path))
    assert len(before) == 4 and sum(map(is_temporary, before)) == 2
    assert remove_leftovers(tmp_path) == [] and sorted(os.listdir(tmp_path)) == before
    process.communicate()
    assert process.returncode == -9 and sorted(os.listdir(tmp_path)) == before
    assert remove_leftovers(tmp_path, only="other") == [] and sorted(os.listdir(tmp_path)) == before
    said = remove_leftovers(tmp_path)
    assert said == [f"removed what a killed process left of {tmp_path / name}" for name in ("file", "model")]
    assert sorted(os.listdir(tmp_path)) == [".file.mine.tmp", "file"]
    assert (tmp_path / "file").read_text(encoding="utf-8") == "old"


@posix
@pytest.mark.parametrize("moment", ["before the new folder", "before the old one is removed"])
def test_a_change_of_folders_that_was_cut_off_is_completed(tmp_path: Path, moment: str) -> None:
    put_folder(tmp_path / "model", "old")
    process = begin(tmp_path, moment)
    process.communicate()
    assert process.returncode == -9
    if moment == "before the new folder":
        assert not (tmp_path / "model").exists()
    said = remove_leftovers(tmp_path)
    assert (len(said), os.listdir(tmp_path)) == (int(moment == "before the new folder"), ["model"])
    assert content(tmp_path / "model") == {"a.txt": "new"}


@posix
def test_without_locks_what_is_left_goes_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network drive that has none."""

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    old, fresh = (tmp_path / f".a.{number:012x}.dreamfolder-tmp" for number in (1, 2))
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 90_000,) * 2)
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [fresh.name]
    remove_leftovers(tmp_path / "gone")
    with replacing(tmp_path / "a") as stream:
        stream.write(b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_on_windows_a_file_that_is_being_read_is_replaced_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated: there, replacing a file fails while another process has it open, and so does renaming an open one."""
    monkeypatch.setattr(whole_files, "_POSIX", False)
    monkeypatch.setattr(whole_files, "_APART", 0.0)
    place, refused = os.replace, []

    def replace(source: str, target: str) -> None:
        if len(refused) < 3:
            refused.append(target)
            raise PermissionError(13, "The process cannot access the file")
        place(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write_text(str(tmp_path / "a"), "new")
    assert len(refused) == 3 and sorted(os.listdir(tmp_path)) == ["a"]
    left = tmp_path / f".a.{1:012x}.dreamfolder-tmp"
    left.write_bytes(b"half")
    assert remove_leftovers(str(tmp_path)) == []  # it may be between closing and renaming
    os.utime(left, (time.time() - 90,) * 2)
    assert len(remove_leftovers(str(tmp_path))) == 1 and os.listdir(tmp_path) == ["a"]
