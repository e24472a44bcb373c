"""From outputs to one number: the element loss, its mean per sample, the terms of a step, and a micro-batch's share of
the window's loss.

For the samples i of one optimiser step (all micro-batches together), with c_i the sample's own weight
(prior_loss_weight of a regularisation image) and w the weight by timestep:

    l_i = mean over channels, height, width of rho(output_i - target_i), by place as masking.py says
    L   = (1/Z) * sum_i c_i * sum over terms of w(t_i) * l_i

A term is one thing that the network is asked for: to denoise, and later to stay near what it knew before. rho is the
square or another error of huber.py. Z is the number of samples of the step, not the sum of their weights: else lowering
one sample's weight would raise everybody else's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from library.objective.masking import UNCHANGED_MASKS, MaskSettings, gain, place_weights


@dataclass(frozen=True)
class Term:
    """One term of the loss of a micro-batch: w(t_i) * l_i of each sample, (B,) float32, and its name in logs."""

    name: str
    losses: Tensor


def sum_terms(terms: Sequence[Term]) -> Tensor:
    """The sum of the terms for each sample, (B,) float32; of a single term its losses as they are.

    Raises ValueError for terms of different shapes, which would else be broadcast, and for none.
    """
    if len({term.losses.shape for term in terms}) != 1:
        raise ValueError(f"terms of one shape, not {[tuple(term.losses.shape) for term in terms]}")
    return reduce(torch.add, (term.losses for term in terms))


def per_sample_loss(
    output: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    settings: MaskSettings = UNCHANGED_MASKS,
    rho: Callable[[Tensor], Tensor] = torch.square,
) -> Tensor:
    """l_i: the mean error over all dimensions but the first, (B, ...) -> (B,), always in float32.

    `rho` makes errors of differences (B, ...). A `mask` (B, 1, h, w) in [0, 1], on the device of the output, weighs
    the errors before the mean is taken.
    Raises ValueError for different shapes, which would else be broadcast.
    """
    if output.shape != target.shape:
        raise ValueError(f"the output has the shape {tuple(output.shape)}, its target {tuple(target.shape)}")
    errors = rho(output.float() - target.float())
    if mask is None:
        return errors.flatten(1).mean(1)
    if mask.shape != (len(output), 1, *output.shape[2:]):
        raise ValueError(f"the output has the shape {tuple(output.shape)}, its mask {tuple(mask.shape)}")
    weights = place_weights(mask, settings)
    return (errors * weights).flatten(1).mean(1) * gain(weights, settings)


def window_share(losses: Tensor, weights: Tensor, window_samples: int) -> Tensor:
    """What a micro-batch contributes to L: sum(c_i * losses_i) / Z, a float32 scalar to call backward on.

    `losses` (B,) are those of all terms together, or of one of them, `weights` (B,) the c_i, `window_samples` is Z.
    The shares of a step's micro-batches add up to its loss and their gradients to its gradient, however unequal they
    are; nothing else may divide by the number of micro-batches. Raises ValueError for shapes that differ and for Z < B.
    """
    if losses.shape != weights.shape or losses.dim() != 1:
        raise ValueError(f"one weight for each loss: {tuple(losses.shape)} losses, {tuple(weights.shape)} weights")
    if window_samples < len(losses):
        raise ValueError(f"a window of {window_samples} samples cannot hold a micro-batch of {len(losses)}")
    return (losses.float() * weights.float()).sum() / window_samples
