"""Merge LoRAs: the weighted sum of their ΔW, exactly or at a given rank.

The sum of up1 @ down1 and up2 @ down2 is the product of the stacked factors, of rank r1 + r2; the SVD gives its best
approximation at a lower rank. Summing the factors, (up1 + up2) @ (down1 + down2), would give another ΔW.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from networks.adapter import AdapterError
from networks.arithmetic.factors import Factors
from networks.arithmetic.svd import decompose_product

Term = tuple[Factors, float]  # a layer and its ratio
Rank = Callable[[Sequence[Term]], int]


@dataclass(frozen=True, eq=False)
class WeightedFactors:
    """One LoRA of a sum: its file's name, its layers, and the ratio of a layer by its name."""

    name: str
    layers: Mapping[str, Factors]
    ratio: Callable[[str], float]


@dataclass(frozen=True, eq=False)
class Combined:
    """The layers of the sum, and the share of the sum's norm that they keep (over all layers)."""

    layers: dict[str, Factors]
    kept: float


def combine(
    sources: Sequence[WeightedFactors],
    rank: Rank | None = None,
    device: torch.device | str = "cpu",
    clamp_quantile: float = 1.0,
) -> Combined:
    """The sum of all sources, layer by layer. `rank` gives the highest rank of a layer; None: exact, by stacking.

    alpha / rank of each layer is that of the first source that has it. A source with ratio 0 is skipped. AdapterError:
    layers of one name with different shapes, or only ratios of 0.
    """
    terms = _terms(sources)
    _check_shapes(sources)
    layers: dict[str, Factors] = {}
    kept = total = 0.0
    for name, layer_terms in terms.items():
        whole = layers[name] = stack(layer_terms)
        if rank is None:
            continue
        limit = rank(layer_terms)
        parts = decompose_product(*whole.to(device).matrices())
        if whole.rank > limit or clamp_quantile < 1:
            up, down = parts.factors(limit, clamp_quantile)
            layers[name] = whole.shaped(up.cpu(), down.cpu(), whole.scale * down.shape[0])
        squares = (whole.scale * parts.values.double()).square()
        kept, total = kept + float(squares[:limit].sum()), total + float(squares.sum())
    return Combined(layers, (kept / total) ** 0.5 if total else 1.0)


def stack(terms: Sequence[Term]) -> Factors:
    """The exact sum of ratio * ΔW over the terms; its rank is the sum of their ranks, its alpha / rank the first one's.

    A single term with ratio 1 is returned unchanged.
    """
    first, ratio = terms[0]
    if len(terms) == 1 and ratio == 1:
        return first
    dtype = torch.float64 if first.up.dtype == torch.float64 else torch.float32
    ups = [layer.up.to(dtype).flatten(1) * (share * layer.scale / first.scale) for layer, share in terms]
    downs = [layer.down.to(dtype).flatten(1) for layer, _ in terms]
    return first.shaped(torch.cat(ups, 1), torch.cat(downs), first.scale * sum(down.shape[0] for down in downs))


def largest_rank(terms: Sequence[Term]) -> int:
    """The largest rank of the terms, so that the sum is no larger than its parts."""
    return max(layer.rank for layer, _ in terms)


def shuffle_ranks(layer: Factors) -> Factors:
    """The same ΔW with its ranks in random order, drawn from torch's global generator."""
    order = torch.randperm(layer.rank)
    return Factors(layer.down[order], layer.up[:, order], layer.alpha)


def _terms(sources: Sequence[WeightedFactors]) -> dict[str, list[Term]]:
    terms: dict[str, list[Term]] = {}
    for source in sources:
        for name, layer in source.layers.items():
            if (ratio := source.ratio(name)) != 0:
                terms.setdefault(name, []).append((layer, ratio))
    if not terms:
        raise AdapterError("all ratios are 0", "use ratios such as 0.5 0.5")
    return terms


def _check_shapes(sources: Sequence[WeightedFactors]) -> None:
    """AdapterError if layers of one name have ΔW of different shapes, as their models differ."""
    seen: dict[str, tuple[str, tuple[int, int]]] = {}
    for source in sources:
        for name, layer in source.layers.items():
            shape = (layer.up.shape[0], layer.down[0].numel())
            where, expected = seen.setdefault(name, (source.name, shape))
            if shape != expected:
                raise AdapterError(
                    f"{name} is {expected[0]} x {expected[1]} in {where} and {shape[0]} x {shape[1]} in {source.name}",
                    "merge only LoRAs that were trained on the same kind of model",
                )
