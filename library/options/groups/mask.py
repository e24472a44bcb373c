"""Options of masked loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options.flag import flag


@dataclass(frozen=True)
class MaskOptions:
    """Masks from files or from transparency, and how they weight the loss."""

    masked_loss: bool = flag(False, "Weight the loss by each image's mask: white counts fully, black not at all.")
    conditioning_data_dir: Path | str | None = flag(
        None,
        "With masked_loss: folder or URL of masks named like their images; images without one count fully.",
        may_change_on_resume=True,
    )
    alpha_mask: bool = flag(False, "Use each image's own transparency as its mask.")
    mask_floor: float = flag(0.0, "Minimum of the mask, 0 to 1; lower values are raised to it.", at_least=0, at_most=1)
    mask_invert: bool = flag(False, "Invert all masks: black counts fully, white not at all.")
    mask_normalise: str = flag(
        "none",
        "Scale of masked losses: sample = each image counts the same however small its mask, up to 4 times; none ="
        " as masked.",
        choices=("none", "sample"),
    )
