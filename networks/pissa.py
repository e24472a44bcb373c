"""PiSSA (arXiv 2404.02948, equations 2 to 4): a LoRA that starts as the principal part of the base's weight.

The paper changes the base to W - scale · B0 A0. Here the base stays unchanged and the adapter adds
scale · (B A - B0 A0) to its output: the function and its gradients are the same, and nothing is rounded. A file holds
this difference exactly, as a LoRA of twice the rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from networks.adapter import AdapterError, Layer

# With these, subspace iteration is exact to rounding for usual spectra.
_EXTRA_COLUMNS = 10
_ITERATIONS = 8


def principal_factors(layer: Layer, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """(A0, B0) in float32 on the CPU with scale · B0 A0 = the `rank` largest singular values of W. AdapterError."""
    if weight.is_meta:
        raise AdapterError("init=pissa needs the weights of the base model", "load the model before the network")
    matrix = weight.detach().flatten(1).float()
    if rank > min(matrix.shape):
        raise AdapterError(
            f"{layer.name}: init=pissa with rank {rank}, but the weight has only {min(matrix.shape)} singular values",
            f"use a rank of at most {min(matrix.shape)}",
        )
    if 4 * (rank + _EXTRA_COLUMNS) >= min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        right = right.mT
    else:
        left, values, right = torch.svd_lowrank(matrix, rank + _EXTRA_COLUMNS, _ITERATIONS)
    root = (values[:rank] / scale).sqrt()
    down = (root[:, None] * right[:, :rank].mT).reshape(rank, *layer.shape[1:])
    up = (left[:, :rank] * root).reshape(layer.shape[0], rank, *([1, 1] if layer.is_conv else []))
    return down.contiguous().cpu(), up.contiguous().cpu()
