"""Masked loss: the loss weight of each position of a sample.

With m the mask of a sample at the size of its latents, from 0 (ignored) to 1 (full weight):

    m      = clamp(mask or 1 - mask, floor, 1)
    l_i    = g_i * mean over channels, height, width of m * rho(output - target)
    g_i    = 1, or normalised by sample: min(1 / max(mean(m), 1e-3), 4)

The gain of a sample does not depend on the other samples of its batch. It is capped so that a sample with a tiny mask
does not outweigh all others.
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
    """How masks become loss weights. The defaults leave them unchanged.

    `floor` is the least weight of any position, 0 to 1; `invert` inverts the mask; `normalise` "sample" compensates for
    the size of a mask by a gain of up to 4.
    """

    floor: float = 0.0
    invert: bool = False
    normalise: Literal["none", "sample"] = "none"

    @classmethod
    def from_options(cls, options: MaskOptions) -> MaskSettings:
        """The settings of the options."""
        normalise: Literal["none", "sample"] = "sample" if options.mask_normalise == "sample" else "none"
        return cls(options.mask_floor, options.mask_invert, normalise)

    @property
    def missing(self) -> float:
        """The mask value for an image without a mask, so that it has full weight."""
        return 0.0 if self.invert else 1.0


UNCHANGED_MASKS = MaskSettings()


def mask_weights(mask: Tensor, settings: MaskSettings) -> Tensor:
    """m: (B, 1, h, w) float32, from a mask (B, 1, h, w) in [0, 1]."""
    weights = mask.float()
    if settings.invert:
        weights = 1.0 - weights
    return weights.clamp(settings.floor, 1.0)


def gain(weights: Tensor, settings: MaskSettings) -> Tensor:
    """g_i: (B,) float32, from weights m (B, 1, h, w). All ones without normalisation."""
    if settings.normalise == "none":
        return torch.ones(len(weights), dtype=torch.float32, device=weights.device)
    return weights.flatten(1).mean(1).clamp(min=_LEAST_MEAN).reciprocal().clamp(max=_LARGEST_GAIN)
