"""A linear map from latents to colours, fitted to a VAE: pictures of latents at a hundredth of the cost of decoding.

The VAE's decoder is nearly linear at the scale of its stride, as its latents are a small coloured image. The map is the
least squares solution of  [z, 1] A = c  over all places of some images, with z the latents of a place and c the mean
colour of the pixels that the VAE decodes there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentRgb:
    """`matrix` (C + 1, 3) float64 on the CPU: colours in [-1, 1] of latents (unscaled), the last row added. `error`:
    the root mean square difference to the VAE's colours, of their range, where it was fitted."""

    matrix: Tensor
    error: float

    def colours(self, latents: Tensor) -> Tensor:
        """(3, h, w) float32 on the CPU, in about [-1, 1], of latents (C, h, w), unscaled."""
        return (with_ones(latents) @ self.matrix).T.reshape(3, *latents.shape[1:]).float()


def fit_latent_rgb(pairs: Iterable[tuple[Tensor, Tensor]]) -> LatentRgb:
    """Fit the map to latents (C, h, w), unscaled, with the pixels (3, H, W) in about [-1, 1] that the VAE makes of
    them. Raises ValueError without a pair, and for values that are not finite."""
    rows, colours = [], []
    for latents, pixels in pairs:
        rows.append(with_ones(latents))
        seen = pixels.detach().to("cpu", torch.float64).clamp(-1, 1)
        pooled = torch.nn.functional.adaptive_avg_pool2d(seen, (latents.shape[1], latents.shape[2]))
        colours.append(pooled.flatten(1).T)
    if not rows:
        raise ValueError("there are no latents to fit to")
    inputs, targets = torch.cat(rows), torch.cat(colours)
    if not (inputs.isfinite().all() and targets.isfinite().all()):
        raise ValueError("the VAE makes NaN or infinite values")
    # gelsd: images of one colour do not determine the matrix, and get the smallest one
    matrix = torch.linalg.lstsq(inputs, targets, driver="gelsd").solution
    return LatentRgb(matrix, float((inputs @ matrix - targets).square().mean().sqrt()) / 2)


def with_ones(latents: Tensor) -> Tensor:
    """(h w, C + 1) float64 on the CPU of latents (C, h, w)."""
    flat = latents.detach().to("cpu", torch.float64).flatten(1).T
    return torch.cat([flat, torch.ones(len(flat), 1, dtype=torch.float64)], 1)
