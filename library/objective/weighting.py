"""Timestep weights of the loss.

A weighting is defined by its weight W(S) on the error of x0, S being the signal-to-noise ratio. The error of the noise
is S times and that of v S + 1 times the error of x0. So the loss weight is W / S for noise prediction and W / (S + 1)
for v-prediction:

    min_snr     W = min(S, gamma)   (arXiv 2303.09556)
    debiased    W = sqrt(S): 1 / sqrt(S) for the noise   (arXiv 2310.08442)
                for v "equivalent" is the same W; "amplification" has 1 / sqrt(S + 1), the factor from an error of the
                output to one of x0 (for the noise 1 / sqrt(S)); "kohya" has 1 / (S + 1)
    noise_like  W = S, v only: the loss of noise prediction
                (kohya's scale_v_pred_loss_like_noise_pred)
    v_like      W = S + lambda (S + 1), noise only: plus lambda times the loss of v-prediction
                (kohya's v_pred_like_loss)

As in sd-scripts S is limited to 1000, except for min_snr and "equivalent"; this only affects timestep 0. With a floor f
the weight is W(max(S, f)): with a zero terminal SNR most weights would be 0 at the last timestep. Several weightings
multiply, as in sd-scripts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from library.objective.process import Prediction

if TYPE_CHECKING:
    from library.options.groups.objective import ObjectiveOptions

Kind = Literal["min_snr", "debiased", "noise_like", "v_like"]
Reading = Literal["equivalent", "amplification", "kohya"]

_LARGEST_SNR = 1000.0


@dataclass(frozen=True)
class Weighting:
    """One timestep weighting. `strength` is gamma of min_snr or lambda of v_like; `reading` selects the formula of
    debiased for v; `floor` is f above, 0 for none."""

    kind: Kind
    strength: float = 0.0
    reading: Reading = "equivalent"
    floor: float = 0.0

    @classmethod
    def from_options(cls, options: ObjectiveOptions) -> tuple[Weighting, ...]:
        """The weightings of the options, which multiply."""
        enabled: list[tuple[Kind, float]] = []
        if options.min_snr_gamma:
            enabled.append(("min_snr", options.min_snr_gamma))
        if options.debiased_estimation_loss:
            enabled.append(("debiased", 0.0))
        if options.scale_v_pred_loss_like_noise_pred:
            enabled.append(("noise_like", 0.0))
        if options.v_pred_like_loss:
            enabled.append(("v_like", options.v_pred_like_loss))
        readings: dict[str, Reading] = {"amplification": "amplification", "kohya": "kohya"}
        reading = readings.get(options.debiased_v_weight, "equivalent")
        return tuple(cls(kind, strength, reading, options.snr_floor) for kind, strength in enabled)

    def __call__(self, snr: Tensor, prediction: Prediction) -> Tensor:
        """The loss weight of each sample: (B,) float32, from S (B,) float32.

        Raises ValueError for an unknown prediction, and for a weighting that is not defined for it.
        """
        if prediction not in ("epsilon", "v"):
            raise ValueError(f'the prediction must be "epsilon" or "v", not {prediction!r}')
        if (self.kind, prediction) in (("noise_like", "epsilon"), ("v_like", "v")):
            raise ValueError(f"the weighting {self.kind} is not defined for {prediction} prediction")
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
