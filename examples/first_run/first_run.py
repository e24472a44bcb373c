"""Trains a subject on the pictures that ship, and says where everything is. first_run.sh and first_run.bat start it.

Nothing that is done is done again: a model newer than the pictures and the settings is left as it is.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path("examples") / "first_run"
OUTPUT = Path("output") / "first_run"
CONFIG, PICTURES = HERE / "dreambooth.toml", HERE / "train"
MINIATURE, TRAINED, LOGS = OUTPUT / "miniature.safetensors", OUTPUT / "robot.safetensors", OUTPUT / "logs"

TRAIN = ("train_db.py", "--config_file", str(CONFIG))


def typed(*command: str) -> str:
    """A command of this environment's Python as a user types it in the project's folder."""
    place = Path(sys.executable)
    python = str(place.relative_to(ROOT)) if place.is_relative_to(ROOT) else str(place)
    words = [python, *command]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def run(*command: str) -> None:
    """Run this environment's Python with `command` in the project's folder; exit as it exits when it fails."""
    print(f"\n> {typed(*command)}", flush=True)
    status = subprocess.call([sys.executable, *command], cwd=ROOT)
    if status != 0:
        raise SystemExit(status)


def is_trained() -> bool:
    """Whether the trained model is there and newer than all it is made from."""
    made_from = [ROOT / CONFIG, ROOT / MINIATURE, *(ROOT / PICTURES).rglob("*.*")]
    trained = ROOT / TRAINED
    if not trained.exists() or not all(path.exists() for path in made_from):
        return False
    return trained.stat().st_mtime >= max(path.stat().st_mtime for path in made_from)


def main() -> None:
    """Make the miniature, train it, and say where everything is."""
    if is_trained():
        print(f"{TRAINED} is newer than its pictures and settings: nothing to train.")
    else:
        if not (ROOT / MINIATURE).exists():
            run("-m", "examples.first_run.make_tiny_model", str(MINIATURE))
        run(*TRAIN)
    print(
        f"""
The trained model   {ROOT / TRAINED}
It started from     {MINIATURE}  (a miniature with random weights: its pictures stay noise)
The pictures        {PICTURES}
The settings        {CONFIG}
The losses          {LOGS}
  to see them       {typed("-m", "tensorboard.main", "--logdir", str(LOGS))}
To train again      {typed(*TRAIN)}
  what it would do  {typed(*TRAIN, "--dry_run")}
  all its options   {typed("train_db.py", "--help")}"""
    )


if __name__ == "__main__":
    main()
