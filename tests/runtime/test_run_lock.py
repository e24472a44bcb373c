"""No two runs write files of one name in one folder, and a lock ends with its process."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from library.options.mistakes import UserError
from library.runtime import run_lock
from library.runtime.run_lock import lock_file, writing_alone

ROOT = Path(__file__).resolve().parents[2]

# Holds the lock until it is killed; its child, which stands for a data worker, lives on.
_HOLDER = """
import os, sys
from pathlib import Path
from library.runtime.run_lock import writing_alone
with writing_alone(Path(sys.argv[1]), "dog", print):
    if hasattr(os, "fork") and not os.fork():
        os.close(1)
    else:
        print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_of_a_name_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    words = [sys.executable, "-c", _HOLDER, str(tmp_path)]
    holder = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdin is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError) as refused, writing_alone(tmp_path, "dog", pytest.fail):
        pass
    said = str(refused.value)
    assert f"another run (process {holder.pid} on " in said and f"--output_dir {tmp_path}" in said
    assert "use another --output_name" in said
    with writing_alone(tmp_path, "cat", pytest.fail), writing_alone(tmp_path / "other", "dog", pytest.fail):
        assert lock_file(tmp_path, "cat").exists()
    holder.kill()
    holder.wait()  # its child still waits for input
    with writing_alone(tmp_path, "dog", pytest.fail):
        pass
    assert not os.listdir(tmp_path)  # a folder that was made, and stayed empty, is gone too
    holder.stdin.close()


def test_a_folder_without_locks_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl if os.name == "posix" else run_lock.msvcrt, "lockf", refuse, raising=False)
    monkeypatch.setattr(run_lock.fcntl if os.name == "posix" else run_lock.msvcrt, "locking", refuse, raising=False)
    said: list[str] = []
    with writing_alone(tmp_path / "sub", "dog", said.append):
        pass
    assert said == [
        f"{tmp_path / 'sub'} has no locks (No locks available): start no second run with --output_name dog there"
    ]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), writing_alone(tmp_path / "file", "dog", said.append):
        pass


@pytest.mark.skipif(os.name != "posix", reason="Windows asks for no names that long")
def test_a_folder_that_cannot_be_looked_for_is_told_of(tmp_path: Path) -> None:
    """As one in a folder that may not be entered."""
    folder = tmp_path / ("a" * 300)
    with pytest.raises(UserError, match="cannot be written: File name too long"), writing_alone(folder, "dog", print):
        pass
