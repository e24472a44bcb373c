"""Name, write and recognise mask files: a PNG records in a text chunk of what image and with what settings it was made.

So an interrupted run can be continued without a file beside the masks, and masks made or changed by hand are told from
those that may be replaced.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.bounded import json_of
from library.checkpoints.header import CheckpointError
from library.checkpoints.writer import replacing
from library.data.decoding import luminance, read
from library.data.image_files import BadImage
from library.data.scan.listing import stem
from library.data.scan.mask_files import find_masks
from library.data.scan.pairing import MASK_LABEL, folded
from library.messages import listed
from library.options.mistakes import Mistake, Mistakes, UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

_CHUNK = "dreamfolder-mask"


@dataclass(frozen=True)
class Record:
    """What a mask file says of itself: SHA-256 of the image's bytes, settings, whether something was found, and SHA-256
    of the mask's pixels."""

    image: str
    settings: Mapping[str, Any]
    found: bool
    pixels: str


def name_masks(
    names: Collection[str], folder: Path, existing: Collection[str], mistakes: Mistakes, *, beside: bool
) -> dict[str, str]:
    """Name the mask of each image, so that training finds it; both relative to their folders, with "/".

    img0.png; img0.jpg.png if other images are named img0 too; img0-masklabel.png `beside` the images. `existing`: masks
    in their `folder`. Adds mistakes about images for which training would find another file.
    """
    sharing = Counter(folded(stem(name)) for name in names)
    masks = {}
    for name in names:
        alone = sharing[folded(stem(name))] == 1
        masks[name] = f"{stem(name)}{MASK_LABEL}.png" if beside else f"{stem(name) if alone else name}.png"
    owners: dict[str, list[str]] = {}
    for name, mask in masks.items():
        owners.setdefault(folded(mask), []).append(name)
    for same in owners.values():
        if len(same) > 1:
            what = f"{listed(same)} would have the same mask, {masks[same[0]]}"
            mistakes.add(what, "rename all but one of them")
    found, _ = find_masks(names, {*masks.values(), *existing})
    for name, mask in masks.items():
        if found.get(name) != mask and len(owners[folded(mask)]) == 1:
            other = folder / found.get(name, "")
            what = f"training would use {other} as the mask of the image {name}, not the new {mask}"
            mistakes.add(what, f"remove or rename {other}")
    return masks


def write_mask(path: Path, mask: NDArray[np.uint8], image: str, settings: Mapping[str, Any], *, found: bool) -> None:
    """Write a mask (H, W) as a grey PNG, atomically. Raises UserError if it cannot be written."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    facts = PngInfo()
    record = {"image": image, "settings": settings, "found": found, "pixels": _pixel_hash(mask)}
    facts.add_itxt(_CHUNK, json.dumps(record, ensure_ascii=True))
    try:
        with replacing(path) as stream:
            Image.fromarray(mask).save(stream, "png", pnginfo=facts)
    except CheckpointError as error:
        raise UserError([Mistake(str(error))]) from error


def read_record(path: Path) -> Record | None:
    """The record of a mask; None if the file has none, cannot be read, or was changed since."""
    import numpy as np

    def convert(image: Image) -> tuple[str, str]:
        return str(getattr(image, "text", {}).get(_CHUNK, "")), _pixel_hash(np.asarray(luminance(image)))

    try:
        text, pixels = read(path, convert)
        record = Record(**json_of(text))
    except (BadImage, ValueError, TypeError):
        return None
    return record if record.pixels == pixels else None


def _pixel_hash(mask: NDArray[np.uint8]) -> str:
    shape = "x".join(map(str, mask.shape)).encode()
    return hashlib.sha256(shape + mask.tobytes()).hexdigest()
