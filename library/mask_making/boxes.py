"""Read boxes by image from a JSON file. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from library.bounded import json_of
from library.data.scan.pairing import composed
from library.messages import listed
from library.options.mistakes import Mistake, Mistakes
from library.options.text_files import read_text

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels of the upright image; right and bottom are the first pixels outside."""

_FORM = "[[left, top, right, bottom], ...] in pixels, such as [[10, 20, 200, 300]]"


def read_boxes(path: Path, mistakes: Mistakes) -> dict[str, tuple[Box, ...]]:
    """Boxes by the name of their image relative to the folder, with "/", in composed Unicode.

    Adds mistakes about a file that does not hold them.
    """
    text = read_text(path, f"--boxes {path}")
    if isinstance(text, Mistake):
        mistakes.extend([text])
        return {}
    try:
        content = json_of(text)
    except ValueError as error:
        mistakes.add(f"--boxes {path} is not valid JSON ({error})", "correct it")
        return {}
    if not isinstance(content, dict):
        mistakes.add(f"--boxes {path} is not an object", f'write {{"img0.png": {_FORM}}}')
        return {}
    found: dict[str, tuple[Box, ...]] = {}
    for name, raw in content.items():
        boxes = [_box(one) for one in raw] if isinstance(raw, list) else [None]
        good = tuple(box for box in boxes if box is not None)
        if len(good) < len(boxes):
            wrong = raw[boxes.index(None)] if isinstance(raw, list) else raw
            mistakes.add(f"--boxes {path}: {json.dumps(wrong)} is not a box of {name}", f"write {_FORM}")
        found[composed(name)] = good
    return found


def _box(raw: Any) -> Box | None:
    """A box of four numbers, rounded to whole pixels."""
    if not isinstance(raw, list) or len(raw) != 4:
        return None
    if not all(isinstance(side, (int, float)) and not isinstance(side, bool) and math.isfinite(side) for side in raw):
        return None
    left, top, right, bottom = (round(side) for side in raw)
    return (left, top, right, bottom) if left < right and top < bottom else None


def check_boxes(
    path: Path,
    boxes: Mapping[str, Collection[Box]],
    sizes: Mapping[str, tuple[int, int]],
    mistakes: Mistakes,
) -> None:
    """Add mistakes about boxes of images that are not there, and about boxes outside of their images.

    `sizes`: upright size (width, height) of each image by its name, in composed Unicode.
    """
    strange = [name for name in boxes if name not in sizes]
    if strange:
        what = f"--boxes {path} has boxes of images that are not in the folder: {listed(strange)}"
        mistakes.add(what, "name each image by its path in --input_dir, with its extension")
    for name, members in boxes.items():
        width, height = sizes.get(name, (0, 0))
        for left, top, right, bottom in members if name in sizes else ():
            if right <= 0 or bottom <= 0 or left >= width or top >= height:
                what = f"--boxes {path}: [{left}, {top}, {right}, {bottom}] is outside of {name}, {width}x{height}"
                mistakes.add(what, "give pixels of the upright image: left, top, right, bottom")
