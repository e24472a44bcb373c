"""Draw the subject's six images and captions into `train/`. They are in the repository already.

python -m examples.shapes.draw_subject
"""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image

from examples.shapes.world import SUBJECT_BACKGROUNDS, article, render, subject_scene

FOLDER = Path(__file__).resolve().parent / "train" / "10_sks robot"
NAME = "sks robot"


def main() -> None:
    """One image on each background, and a second one on the first two."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for number, background in enumerate((*SUBJECT_BACKGROUNDS, *SUBJECT_BACKGROUNDS[:2]), start=1):
        path = FOLDER / f"robot_{number}.png"
        Image.fromarray(render(subject_scene(background, random.Random(number)))).save(path, optimize=True)
        text = f"{NAME} on {article(background)} background\n"
        path.with_suffix(".txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
