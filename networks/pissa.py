"""PiSSA (arXiv 2404.02948, equations 2 to 4): a LoRA that starts as the principal part of the base's weight.

There the base is changed to W - scale · B0 A0. Here it stays as it is and the same is added to its output: the function
and its gradients are the same, what is taken from the base needs no giving back, and nothing is rounded. A file holds
what changed against the base: scale · (B A - B0 A0), exactly, as a LoRA of twice the rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from networks.adapter import AdapterError, Layer

_MORE = 10  # columns beyond the rank, and rounds: subspace iteration is then exact to rounding for usual spectra
_ROUNDS = 8


def principal_factors(layer: Layer, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """(A0, B0) in float32 on the CPU with scale · B0 A0 = the `rank` largest singular values of W. AdapterError."""
    if weight.is_meta:
        raise AdapterError("init=pissa needs the weights of the base model")
    matrix = weight.detach().flatten(1).float()
    if rank > min(matrix.shape):
        raise AdapterError(
            f"{layer.name}: init=pissa has {min(matrix.shape)} singular values to take, not {rank}",
            f"Give at most {min(matrix.shape)} as rank.",
        )
    if 4 * (rank + _MORE) >= min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        right = right.mT
    else:
        left, values, right = torch.svd_lowrank(matrix, rank + _MORE, _ROUNDS)
    root = (values[:rank] / scale).sqrt()
    down = (root[:, None] * right[:, :rank].mT).reshape(rank, *layer.shape[1:])
    up = (left[:, :rank] * root).reshape(layer.shape[0], rank, *([1, 1] if layer.is_conv else []))
    return down.contiguous().cpu(), up.contiguous().cpu()
