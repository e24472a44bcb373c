"""Mistakes are the last thing on the screen, however a program is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from library.options.report import ends_in_traceback

ROOT = Path(__file__).resolve().parents[2]


def test_below_accelerate_launch_the_mistakes_come_last(tmp_path: Path) -> None:
    """As kohya_ss starts a training: in another folder, with its own output."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--dynamo_backend", "no", "--mixed_precision", "no", str(ROOT / "train_db.py"), "--learning_rat", "ü"]
    done = subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 1
    first, traceback, last = done.stderr.partition("Traceback")
    assert "--learning_rat (command line) is not a flag" in first
    assert traceback and "CalledProcessError" in last
    assert last.partition("exit status 2.")[2].strip() == first[first.index("- --") :].strip()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("/venv/bin/python /venv/bin/accelerate launch --num_processes 1 train_db.py", True),
        ("python -m accelerate.commands.launch train_db.py", True),
        ("/venv/bin/python /venv/bin/accelerate-launch train_db.py", True),
        ("C:\\venv\\Scripts\\python.exe C:\\venv\\Scripts\\accelerate.exe launch train_db.py", True),
        ("python -m accelerate.commands.launch --quiet train_db.py", False),
        ("python -m accelerate.commands.launch -q train_db.py", False),
        ("bash", False),
        ("python kohya_gui.py --headless", False),
        ("python -m accelerate.commands.config", False),
        ("", False),
    ],
)
def test_the_launcher_is_known_by_its_command_line(words: str, found: bool) -> None:
    assert ends_in_traceback(words.split()) is found
