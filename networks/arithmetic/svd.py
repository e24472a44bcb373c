"""Best low-rank approximations of a weight's change (Eckart and Young, 1936).

Computed in float32 (float64 for float64) on the device of the arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Decomposition:
    """M = u @ diag(values) @ vh: u (m, k), values (k,) from the largest down, vh (k, n)."""

    u: Tensor
    values: Tensor
    vh: Tensor

    def factors(self, rank: int, clamp_quantile: float = 1.0) -> tuple[Tensor, Tensor]:
        """Up (m, rank) and down (rank, n) with the best product of this rank; fewer ranks if M has fewer.

        Both get the square roots of the singular values, which keeps small numbers within fp16's range. A quantile
        below 1 clamps outliers as in sd-scripts: `up` gets all singular values, then both are limited to ± this
        quantile of all numbers.
        """
        u, values, vh = self.u[:, :rank], self.values[:rank], self.vh[:rank]
        if clamp_quantile >= 1:
            roots = values.sqrt()
            return u * roots, roots[:, None] * vh
        up = u * values
        limit = quantile(torch.cat([up.flatten(), vh.flatten()]), clamp_quantile)
        return up.clamp(-limit, limit), vh.clamp(-limit, limit)

    def kept(self, rank: int) -> float:
        """The share of M's Frobenius norm that the first `rank` singular values keep; 1 for a zero matrix."""
        squares = self.values.double().square()
        total = float(squares.sum())
        return (float(squares[:rank].sum()) / total) ** 0.5 if total else 1.0


def decompose(matrix: Tensor) -> Decomposition:
    """The singular value decomposition of a matrix (m, n); of a tall or wide one through its QR, which is faster."""
    tall = _working_copy(matrix)
    is_wide = tall.shape[0] < tall.shape[1]
    tall = tall.T if is_wide else tall
    if tall.shape[0] >= 2 * tall.shape[1]:
        basis, square = torch.linalg.qr(tall)
        u, values, vh = torch.linalg.svd(square)
        u = basis @ u
    else:
        u, values, vh = torch.linalg.svd(tall, full_matrices=False)
    return Decomposition(vh.T, values, u.T) if is_wide else Decomposition(u, values, vh)


def leading(matrix: Tensor, rank: int, rounds: int = 4) -> Decomposition:
    """The first `rank` singular values and vectors of a matrix (m, n) by subspace iteration, which is many times faster
    than the whole decomposition (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1). The start is
    fixed: equal matrices have equal results."""
    working = _working_copy(matrix)
    columns = 2 * rank + 8
    if 2 * columns >= min(working.shape):
        whole = decompose(working)
        return Decomposition(whole.u[:, :rank], whole.values[:rank], whole.vh[:rank])
    start = torch.randn(working.shape[1], columns, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(working @ start.to(working)).Q
    for _ in range(rounds):
        basis = torch.linalg.qr(working @ torch.linalg.qr(working.T @ basis).Q).Q
    found = decompose(basis.T @ working)
    return Decomposition(basis @ found.u[:, :rank], found.values[:rank], found.vh[:rank])


def decompose_product(up: Tensor, down: Tensor) -> Decomposition:
    """The decomposition of up (m, r) @ down (r, n) at the cost of an r x r matrix: QR of both, then an SVD.

    Returns min(r, m, n) singular values; all others are 0.
    """
    left, inner_left = torch.linalg.qr(_working_copy(up))
    right, inner_right = torch.linalg.qr(_working_copy(down).T)
    u, values, vh = torch.linalg.svd(inner_left @ inner_right.T, full_matrices=False)
    return Decomposition(left @ u, values, vh @ right.T)


def quantile(numbers: Tensor, share: float) -> float:
    """The quantile of `numbers` (n,), interpolated. torch.quantile is limited to 16 million numbers."""
    ordered = numbers.sort().values
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return float(torch.lerp(ordered[low], ordered[high], position - low))


def _working_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
