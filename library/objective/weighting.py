"""Weights by timestep. A weighting is defined by its weight W(SNR) on the error of x0; on the loss of a network that
predicts the noise it is W / SNR, on that of one that predicts v it is W / (SNR + 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from library.objective.process import Prediction


def min_snr_weight(snr: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """W = min(SNR, gamma)   (arXiv 2303.09556): min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v.

    `snr` (B,) float32; gives (B,) float32. Raises ValueError for an unknown prediction.
    """
    capped = torch.clamp(snr, max=gamma)
    if prediction == "epsilon":
        return capped / snr
    if prediction == "v":
        return capped / (snr + 1.0)
    raise ValueError(f'a network predicts "epsilon" or "v", not {prediction!r}')
