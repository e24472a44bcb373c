"""Which parts of an image count in its loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options.flag import flag


@dataclass(frozen=True)
class MaskOptions:
    """Masks from files or transparency, and what they do to the loss."""

    masked_loss: bool = flag(False, "Weight each part of an image by its mask: white counts fully, black not at all.")
    conditioning_data_dir: Path | str | None = flag(
        None,
        "With masked_loss: folder of masks with the names of the images, or its URL; an image without one counts "
        "fully.",
        may_change_on_resume=True,
    )
    alpha_mask: bool = flag(False, "An image's own transparency is its mask.")
    mask_floor: float = flag(
        0.0, "What masked parts still count: masks below it are raised to it.", at_least=0, at_most=1
    )
    mask_invert: bool = flag(False, "Swap black and white of all masks.")
    mask_normalise: str = flag(
        "none",
        "With sample an image counts the same however little of it its mask leaves, up to 4 times; none: as it is.",
        choices=("none", "sample"),
    )
