"""The loss: its mean per sample, the sum of its terms, and a batch's share of the window's loss.

For the samples i of a window (the batches of one optimizer step), with c_i the sample weight (prior_loss_weight of a
regularisation image) and w the timestep weight:

    l_i = mean over channels, height, width of rho(output_i - target_i), weighted by the mask (masking.py)
    L   = (1/Z) * sum_i c_i * sum over terms k of lambda_k * w(t_i) * l_ik

A term is one part of the loss, such as denoising, with its weight lambda. rho is the square or another element-wise
loss of huber.py. Z is the number of samples of the window, not the sum of their weights: else lowering one sample's
weight would raise all others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from library.objective.masking import UNCHANGED_MASKS, MaskSettings, gain, mask_weights


@dataclass(frozen=True)
class Term:
    """One term of a batch's loss: w(t_i) * l_i of each sample, (B,) float32, 0 for samples without it; its name in
    logs, and its weight. `members` (B,) bool: the samples over which the mean of `losses` is logged too; None: none."""

    name: str
    losses: Tensor
    weight: float = 1.0
    members: Tensor | None = None

    @property
    def weighted(self) -> Tensor:
        """The term's part of the loss of each sample, (B,) float32."""
        return self.losses if self.weight == 1 else self.losses * self.weight


def sum_terms(terms: Sequence[Term]) -> Tensor:
    """The weighted sum of the terms for each sample, (B,) float32; the losses of a single term of weight 1 are returned
    unchanged.

    Raises ValueError for terms of different shapes, which would be broadcast, and for no terms.
    """
    if len({term.losses.shape for term in terms}) != 1:
        raise ValueError(f"terms must have one shape, not {[tuple(term.losses.shape) for term in terms]}")
    return reduce(torch.add, (term.weighted for term in terms))


def per_sample_loss(
    output: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    settings: MaskSettings = UNCHANGED_MASKS,
    rho: Callable[[Tensor], Tensor] = torch.square,
) -> Tensor:
    """l_i: the mean of rho(output - target) over all dimensions but the first, (B, ...) -> (B,), always in float32.

    `rho` is applied to the differences (B, ...). A `mask` (B, 1, h, w) in [0, 1], on the output's device, weights the
    values before the mean. Raises ValueError for different shapes, which would be broadcast.
    """
    if output.shape != target.shape:
        raise ValueError(f"the output has the shape {tuple(output.shape)}, the target {tuple(target.shape)}")
    errors = rho(output.float() - target.float())
    if mask is None:
        return errors.flatten(1).mean(1)
    if mask.shape != (len(output), 1, *output.shape[2:]):
        raise ValueError(f"the output has the shape {tuple(output.shape)}, the mask {tuple(mask.shape)}")
    weights = mask_weights(mask, settings)
    return (errors * weights).flatten(1).mean(1) * gain(weights, settings)


def window_share(losses: Tensor, weights: Tensor, window_samples: int) -> Tensor:
    """A batch's part of L: sum(c_i * losses_i) / Z, a float32 scalar to call backward on.

    `losses` (B,) is the weighted sum of all terms or one weighted term, `weights` (B,) the c_i, `window_samples` is Z.
    The shares of a window's batches add up to its loss, and their gradients to its gradient, whatever the batch sizes;
    nothing else may divide by the number of batches. Raises ValueError for different shapes and for Z < B.
    """
    if losses.shape != weights.shape or losses.dim() != 1:
        raise ValueError(f"{tuple(losses.shape)} losses, but {tuple(weights.shape)} weights")
    if window_samples < len(losses):
        raise ValueError(f"a window of {window_samples} samples cannot contain a batch of {len(losses)}")
    return (losses.float() * weights.float()).sum() / window_samples


def sum_of_members(losses: Tensor, members: Tensor) -> Tensor:
    """The sum of the losses (B,) of the members (B,) bool, and their number: (2,) float32, to be added up over batches
    and ranks."""
    counted = members.float()
    return torch.stack(((losses.float() * counted).sum(), counted.sum()))
