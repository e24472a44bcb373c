"""Trains a subject on the images that ship and draws what became of it. first_run.sh and first_run.bat start it.

Nothing that is done is done again: class images that are there are kept, and a model newer than what it is made from
is left as it is.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path("examples") / "shapes"
OUTPUT = Path("output") / "shapes"
BASE, CONFIG, IMAGES = HERE / "shapes.safetensors", HERE / "dreambooth.toml", HERE / "train"
CLASS_IMAGES = OUTPUT / "class" / "1_robot"
TRAINED, SHEET, LOGS = OUTPUT / "robot.safetensors", OUTPUT / "sheet.png", OUTPUT / "logs"

MAKE_CLASS_IMAGES = (
    *("tools/make_class_images.py", "--ckpt", str(BASE), "--outdir", str(CLASS_IMAGES)),
    *("--prompt", "a robot", "--count", "200", "--write_captions", "--caption_extension", ".txt"),
    *("--W", "64", "--H", "64", "--steps", "20", "--scale", "4", "--seed", "1", "--batch_size", "20"),
)
TRAIN = ("train_db.py", "--config_file", str(CONFIG))
DRAW_SHEET = ("-m", "examples.shapes.sheet", str(TRAINED), str(SHEET))


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


def is_newer(made: Path, made_from: Iterable[Path]) -> bool:
    """Whether a file is there and newer than all it is made from."""
    sources = [ROOT / path for path in made_from]
    if not (ROOT / made).exists() or not all(path.exists() for path in sources):
        return False
    return (ROOT / made).stat().st_mtime >= max(path.stat().st_mtime for path in sources)


def main() -> None:
    """Make the class images, train, draw the sheet, and say where everything is."""
    images = [path.relative_to(ROOT) for path in (ROOT / IMAGES).rglob("*.*")]
    if is_newer(TRAINED, (BASE, CONFIG, *images)):
        print(f"{TRAINED} is newer than its images and settings: nothing to train.")
    else:
        run(*MAKE_CLASS_IMAGES)
        run(*TRAIN)
    if not is_newer(SHEET, (TRAINED,)):
        run(*DRAW_SHEET)
    print(
        f"""
Before and after    {ROOT / SHEET}
The trained model   {ROOT / TRAINED}
It started from     {BASE}  (a small Stable Diffusion of coloured shapes, 64 pixels)
The images        {IMAGES}
The class images  {CLASS_IMAGES}
The settings        {CONFIG}
The losses          {LOGS}
  to see them       {typed("-m", "tensorboard.main", "--logdir", str(LOGS))}
To train again      {typed(*TRAIN)}
  what it would do  {typed(*TRAIN, "--dry_run")}
  all its options   {typed("train_db.py", "--help")}
To draw             {typed("gen_img.py", "--ckpt", str(TRAINED), "--prompt", "sks robot --w 64 --h 64 --s 20 --l 4")}"""
    )


if __name__ == "__main__":
    main()
