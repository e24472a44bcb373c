"""How much each place of a sample counts.

With m the mask of a sample at the size of its latents, from 0 (does not count) to 1 (counts fully):

    m      = clamp(mask or 1 - mask, floor, 1)
    l_i    = g_i * mean over channels, height, width of m * rho(output - target)
    g_i    = 1, or normalised by sample: min(1 / max(mean(m), 1e-3), 4)

The gain of a sample never depends on the others of its batch. Its cap keeps a sample with a tiny mask from outweighing
all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from library.options.groups.mask import MaskOptions

_LEAST_MEAN = 1e-3
_LARGEST_GAIN = 4.0


@dataclass(frozen=True)
class MaskSettings:
    """How masks are read. The defaults take them as they are.

    `floor` is what the rest of the image counts at least, 0 to 1; `invert` swaps what counts and what does not;
    `normalise` "sample" makes up for the size of a mask by a gain of up to 4.
    """

    floor: float = 0.0
    invert: bool = False
    normalise: Literal["none", "sample"] = "none"

    @classmethod
    def from_options(cls, options: MaskOptions) -> MaskSettings:
        """The settings that the options ask for."""
        normalise: Literal["none", "sample"] = "sample" if options.mask_normalise == "sample" else "none"
        return cls(options.mask_floor, options.mask_invert, normalise)

    @property
    def missing(self) -> float:
        """What stands all over the mask of an image that has none, so that the image counts fully."""
        return 0.0 if self.invert else 1.0


UNCHANGED_MASKS = MaskSettings()


def place_weights(mask: Tensor, settings: MaskSettings) -> Tensor:
    """m: (B, 1, h, w) float32 of a mask (B, 1, h, w) in [0, 1]."""
    weights = mask.float()
    if settings.invert:
        weights = 1.0 - weights
    return weights.clamp(settings.floor, 1.0)


def gain(weights: Tensor, settings: MaskSettings) -> Tensor:
    """g_i: (B,) float32 of weights m (B, 1, h, w). All ones without normalisation."""
    if settings.normalise == "none":
        return torch.ones(len(weights), dtype=torch.float32, device=weights.device)
    return weights.flatten(1).mean(1).clamp(min=_LEAST_MEAN).reciprocal().clamp(max=_LARGEST_GAIN)
