"""Best approximations of a weight's change by a product of two thin matrices (Eckart and Young, 1936).

Computed in float32 (float64 for float64) on the device of what is handed in.
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
        """Up (m, rank) and down (rank, n) whose product is the best one of that rank; less than `rank` if M has less.

        Each gets half of the values, by their roots, which keeps small numbers within fp16's range. A quantile below 1
        clamps outliers as sd-scripts does: all values go to `up`, then both are cut to ± that quantile of all numbers.
        """
        u, values, vh = self.u[:, :rank], self.values[:rank], self.vh[:rank]
        if clamp_quantile >= 1:
            roots = values.sqrt()
            return u * roots, roots[:, None] * vh
        up = u * values
        limit = quantile(torch.cat([up.flatten(), vh.flatten()]), clamp_quantile)
        return up.clamp(-limit, limit), vh.clamp(-limit, limit)

    def kept(self, rank: int) -> float:
        """The share of M's Frobenius norm that the first `rank` values hold; 1 for a zero matrix."""
        squares = self.values.double().square()
        total = float(squares.sum())
        return (float(squares[:rank].sum()) / total) ** 0.5 if total else 1.0


def decompose(matrix: Tensor) -> Decomposition:
    """The singular value decomposition of a matrix (m, n); of a long one by way of its QR, some times quicker."""
    tall = _computed(matrix)
    is_wide = tall.shape[0] < tall.shape[1]
    tall = tall.T if is_wide else tall
    if tall.shape[0] >= 2 * tall.shape[1]:
        basis, square = torch.linalg.qr(tall)
        u, values, vh = torch.linalg.svd(square)
        u = basis @ u
    else:
        u, values, vh = torch.linalg.svd(tall, full_matrices=False)
    return Decomposition(vh.T, values, u.T) if is_wide else Decomposition(u, values, vh)


def decompose_product(up: Tensor, down: Tensor) -> Decomposition:
    """That of up (m, r) @ down (r, n), at the price of a matrix of r by r: QR of both, then the SVD of what is between.

    There are min(r, m, n) values: all others are 0.
    """
    left, between_left = torch.linalg.qr(_computed(up))
    right, between_right = torch.linalg.qr(_computed(down).T)
    u, values, vh = torch.linalg.svd(between_left @ between_right.T, full_matrices=False)
    return Decomposition(left @ u, values, vh @ right.T)


def quantile(numbers: Tensor, share: float) -> float:
    """The number that a share of `numbers` (n,) lies below, interpolated. torch's own takes 16 million at most."""
    ordered = numbers.sort().values
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return float(torch.lerp(ordered[low], ordered[high], place - low))


def _computed(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
