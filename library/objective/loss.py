"""From outputs to one number: the element loss, its mean per sample, and a micro-batch's share of the window's loss.

For the samples i of one optimiser step (all micro-batches together), with c_i the sample's own weight
(prior_loss_weight of a regularisation image) and w the weight by timestep:

    l_i = mean over channels, height, width of (output_i - target_i)^2
    L   = (1/Z) * sum_i c_i * w(t_i) * l_i

Z is the number of samples of the step, not the sum of their weights: else lowering one sample's weight would raise
everybody else's.
"""

from __future__ import annotations

from torch import Tensor


def per_sample_loss(output: Tensor, target: Tensor) -> Tensor:
    """l_i: the mean squared error over all dimensions but the first, (B, ...) -> (B,), always in float32.

    Raises ValueError for different shapes, which would else be broadcast.
    """
    if output.shape != target.shape:
        raise ValueError(f"the output has the shape {tuple(output.shape)}, its target {tuple(target.shape)}")
    return (output.float() - target.float()).square().flatten(1).mean(1)


def window_share(losses: Tensor, weights: Tensor, window_samples: int) -> Tensor:
    """What a micro-batch contributes to L: sum(c_i * losses_i) / Z, a float32 scalar to call backward on.

    `losses` (B,) are w(t_i) * l_i, `weights` (B,) the c_i, `window_samples` is Z. The shares of a step's micro-batches
    add up to its loss and their gradients to its gradient, however unequal they are; nothing else may divide by
    the number of micro-batches. Raises ValueError for shapes that differ and for Z < B.
    """
    if losses.shape != weights.shape or losses.dim() != 1:
        raise ValueError(f"one weight for each loss: {tuple(losses.shape)} losses, {tuple(weights.shape)} weights")
    if window_samples < len(losses):
        raise ValueError(f"a window of {window_samples} samples cannot hold a micro-batch of {len(losses)}")
    return (losses.float() * weights.float()).sum() / window_samples
