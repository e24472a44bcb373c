"""Train a subject on the example images and draw images before and after. Started by first_run.sh and first_run.bat.

Finished work is not repeated: existing class images are kept, and a model newer than its sources is not trained again.
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
    """A command for this environment's Python, as typed in the project's folder."""
    path = Path(sys.executable)
    python = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
    words = [python, *command]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def run(*command: str) -> None:
    """Run this environment's Python with `command` in the project's folder; exit with its status if it fails."""
    print(f"\n> {typed(*command)}", flush=True)
    status = subprocess.call([sys.executable, *command], cwd=ROOT)
    if status != 0:
        raise SystemExit(status)


def is_newer(target: Path, sources: Iterable[Path]) -> bool:
    """Whether a file exists and is newer than all its sources."""
    paths = [ROOT / path for path in sources]
    if not (ROOT / target).exists() or not all(path.exists() for path in paths):
        return False
    return (ROOT / target).stat().st_mtime >= max(path.stat().st_mtime for path in paths)


def main() -> None:
    """Draw the class images, train, draw the sheet, and print where everything is."""
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
Trained model       {ROOT / TRAINED}
Base model          {BASE}  (a small Stable Diffusion of coloured shapes, 64 pixels)
Training images     {IMAGES}
Class images        {CLASS_IMAGES}
Settings            {CONFIG}
Loss logs           {LOGS}
  to view them      {typed("-m", "tensorboard.main", "--logdir", str(LOGS))}
To train again      {typed(*TRAIN)}
  print the plan    {typed(*TRAIN, "--dry_run")}
  list all options  {typed("train_db.py", "--help")}
To draw images      {typed("gen_img.py", "--ckpt", str(TRAINED), "--prompt", "sks robot --w 64 --h 64 --s 20 --l 4")}"""
    )


if __name__ == "__main__":
    main()
