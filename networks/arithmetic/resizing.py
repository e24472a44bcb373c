"""Resize a LoRA to another rank: a fixed one, or one chosen for each layer from its singular values.

The rules sv_ratio, sv_fro and sv_cumulative are those of sd-scripts, networks/resize_lora.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from networks.arithmetic.factors import Factors
from networks.arithmetic.svd import Decomposition, decompose_product

ZERO = 1e-6  # a layer whose largest singular value is at most this is treated as 0


@dataclass(frozen=True)
class RankRule:
    """At most `rank` (`conv_rank` for kernels larger than 1x1); with a `method` the lowest that reaches `target`."""

    rank: int
    conv_rank: int
    method: str | None = None
    target: float = 0.0

    def limit(self, layer: Factors) -> int:
        """The largest rank of a layer."""
        return self.conv_rank if layer.is_kernel else self.rank


@dataclass(frozen=True, eq=False)
class Resized:
    """A layer with its new rank; `values` are its old singular values, `kept` the share of ΔW's norm that is kept."""

    layer: Factors
    values: Tensor
    kept: float

    @property
    def kept_sum(self) -> float:
        """The share of the sum of its singular values that is kept."""
        total = float(self.values.sum())
        return float(self.values[: self.layer.rank].sum()) / total if total else 1.0

    @property
    def ratio(self) -> float:
        """Its largest singular value over the smallest one that is kept."""
        last = float(self.values[min(self.layer.rank, len(self.values)) - 1])
        return float(self.values[0]) / last if last else float("inf")


def resize(layer: Factors, rule: RankRule, device: torch.device | str = "cpu") -> Resized:
    """The best approximation of a layer's ΔW under a rule, with the same alpha / rank.

    A layer that already has this rank or a lower one is returned unchanged.
    """
    parts = decompose_product(*layer.to(device).matrices())
    rank = choose_rank(parts.values, rule.limit(layer), rule.method, rule.target)
    if rank >= layer.rank:
        return Resized(layer, parts.values, 1.0)
    return Resized(truncate(layer, parts, rank), parts.values, parts.kept(rank))


def truncate(layer: Factors, parts: Decomposition, rank: int) -> Factors:
    """The first `rank` components of a decomposition, with the shapes and alpha / rank of `layer`."""
    up, down = parts.factors(rank)
    return layer.shaped(up.cpu(), down.cpu(), layer.scale * down.shape[0])


def choose_rank(values: Tensor, limit: int, method: str | None = None, target: float = 0.0) -> int:
    """The rank by a rule, 1 to `limit`, from singular values (k,), the largest first.

    sv_ratio: values above the largest / target. sv_cumulative: the fewest whose sum is `target` of the sum of all.
    sv_fro: the fewest whose Frobenius norm is `target` of the norm of all.
    """
    if method is None:
        return limit
    if float(values[0]) <= ZERO:
        return 1
    if method == "sv_ratio":
        rank = int((values > values[0] / target).sum())
    elif method == "sv_cumulative":
        rank = _reaching(values.double(), target)
    elif method == "sv_fro":
        rank = _reaching(values.double().square(), target**2)
    else:
        raise ValueError(method)
    return max(1, min(rank, limit, len(values)))


def _reaching(parts: Tensor, share: float) -> int:
    sums = parts.cumsum(0)
    # the last sum is the total with the same rounding
    return int(torch.searchsorted(sums, share * sums[-1])) + 1


def resize_all(layers: Mapping[str, Factors], rule: RankRule, device: torch.device | str = "cpu") -> dict[str, Resized]:
    """Resize every layer of a file."""
    return {name: resize(layer, rule, device) for name, layer in layers.items()}
