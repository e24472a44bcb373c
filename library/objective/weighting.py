"""Weights by timestep.

A weighting is defined by its weight W(S) on the error of x0, S being the signal-to-noise ratio. As the error of the
noise is S times and that of v S + 1 times the error of x0, the loss of a network that predicts the noise has the
weight W / S, that of one that predicts v the weight W / (S + 1):

    min_snr     W = min(S, gamma)   (arXiv 2303.09556)
    debiased    W = sqrt(S): 1 / sqrt(S) for the noise   (arXiv 2310.08442)
                for v "equivalent" is the same W; "amplification" has 1 / sqrt(S + 1), the factor by which an error of
                the output enters x0 (for the noise that is 1 / sqrt(S)); "kohya" has 1 / (S + 1)
    noise_like  W = S, v only: the loss that noise prediction has
                (kohya's scale_v_pred_loss_like_noise_pred)
    v_like      W = S + lambda (S + 1), noise only: plus lambda times the loss that v-prediction has
                (kohya's v_pred_like_loss)

As elsewhere S counts as 1000 at most, but for min_snr and the equivalent reading: that is timestep 0 alone. With a
floor f the weight is W(max(S, f)): with a zero terminal SNR most of these would be 0 at the last timestep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from library.objective.process import Prediction

if TYPE_CHECKING:
    from library.options.groups.objective import ObjectiveOptions

Kind = Literal["none", "min_snr", "debiased", "noise_like", "v_like"]
Reading = Literal["equivalent", "amplification", "kohya"]

_LARGEST_SNR = 1000.0


@dataclass(frozen=True)
class Weighting:
    """One weight by timestep. `strength` is gamma of min_snr or lambda of v_like; `reading` is that of debiased for v;
    `floor` is f above, 0 for none."""

    kind: Kind = "none"
    strength: float = 0.0
    reading: Reading = "equivalent"
    floor: float = 0.0

    @classmethod
    def from_options(cls, options: ObjectiveOptions) -> Weighting:
        """The weighting that the options ask for. Raises ValueError for more than one: the rules exclude that."""
        asked: list[tuple[Kind, float]] = []
        if options.min_snr_gamma:
            asked.append(("min_snr", options.min_snr_gamma))
        if options.debiased_estimation_loss:
            asked.append(("debiased", 0.0))
        if options.scale_v_pred_loss_like_noise_pred:
            asked.append(("noise_like", 0.0))
        if options.v_pred_like_loss:
            asked.append(("v_like", options.v_pred_like_loss))
        if len(asked) > 1:
            raise ValueError(f"one weight by timestep at a time, not {' and '.join(kind for kind, _ in asked)}")
        kind, strength = asked[0] if asked else ("none", 0.0)
        readings: dict[str, Reading] = {"amplification": "amplification", "kohya": "kohya"}
        reading = readings.get(options.debiased_v_weight, "equivalent")
        return cls(kind, strength, reading, options.snr_floor)

    @property
    def needs_snr(self) -> bool:
        """Whether the process must have an SNR."""
        return self.kind != "none"

    def __call__(self, snr: Tensor, prediction: Prediction) -> Tensor:
        """The factor of the loss of each sample: (B,) float32 of S (B,) float32.

        Raises ValueError for an unknown prediction, and for a weighting that has no meaning with the prediction.
        """
        if prediction not in ("epsilon", "v"):
            raise ValueError(f'a network predicts "epsilon" or "v", not {prediction!r}')
        if (self.kind, prediction) in (("noise_like", "epsilon"), ("v_like", "v")):
            raise ValueError(f"the weighting {self.kind} has no meaning for a network that predicts {prediction}")
        if self.kind == "none":
            return torch.ones_like(snr)
        s = snr if self._unlimited(prediction) else snr.clamp(max=_LARGEST_SNR)
        weight = self._of_x0(s.clamp(min=self.floor), prediction)
        return weight / s if prediction == "epsilon" else weight / (s + 1.0)

    def _unlimited(self, prediction: Prediction) -> bool:
        equivalent = self.kind == "debiased" and prediction == "v" and self.reading == "equivalent"
        return self.kind == "min_snr" or equivalent

    def _of_x0(self, s: Tensor, prediction: Prediction) -> Tensor:
        """W(S)."""
        if self.kind == "min_snr":
            return s.clamp(max=self.strength)
        if self.kind == "noise_like":
            return s
        if self.kind == "v_like":
            return s + self.strength * (s + 1.0)
        if prediction == "epsilon" or self.reading == "equivalent":
            return s.sqrt()
        return (s + 1.0).sqrt() if self.reading == "amplification" else torch.ones_like(s)


UNWEIGHTED = Weighting()
