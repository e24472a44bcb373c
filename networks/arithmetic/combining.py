"""Several LoRAs in one: their ΔW added, each times its ratio, exactly or at a rank.

The sum of up1 @ down1 and up2 @ down2 is the product of the stacked factors, of rank r1 + r2; its best approximation at
a lower rank comes from its SVD. The product of summed factors, (up1 + up2) @ (down1 + down2), is something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from networks.adapter import AdapterError
from networks.arithmetic.factors import Factors
from networks.arithmetic.svd import decompose_product

Term = tuple[Factors, float]  # a layer and what its ΔW is multiplied with
Rank = Callable[[Sequence[Term]], int]


@dataclass(frozen=True, eq=False)
class WeightedFactors:
    """One LoRA of a sum: its file's name, its layers, and what the ΔW of a layer (by its name) is multiplied with."""

    name: str
    layers: Mapping[str, Factors]
    ratio: Callable[[str], float]


@dataclass(frozen=True, eq=False)
class Combined:
    """The layers of the sum, and the share of the sum's norm that they hold (all layers together)."""

    layers: dict[str, Factors]
    kept: float


def combine(
    sources: Sequence[WeightedFactors],
    rank: Rank | None = None,
    device: torch.device | str = "cpu",
    clamp_quantile: float = 1.0,
) -> Combined:
    """The sum of all sources, layer by layer. `rank` tells the highest rank of a layer; None: exact, by stacking.

    alpha / rank of each layer is that of the first source with it. A ratio of 0 leaves a source out. AdapterError:
    layers of one name that do not fit together, or nothing to sum.
    """
    terms = _terms(sources)
    _check(sources)
    layers: dict[str, Factors] = {}
    kept = total = 0.0
    for name, found in terms.items():
        whole = layers[name] = stack(found)
        if rank is None:
            continue
        limit = rank(found)
        parts = decompose_product(*whole.to(device).matrices())
        if whole.rank > limit or clamp_quantile < 1:
            up, down = parts.factors(limit, clamp_quantile)
            layers[name] = whole.shaped(up.cpu(), down.cpu(), whole.scale * down.shape[0])
        squares = (whole.scale * parts.values.double()).square()
        kept, total = kept + float(squares[:limit].sum()), total + float(squares.sum())
    return Combined(layers, (kept / total) ** 0.5 if total else 1.0)


def stack(terms: Sequence[Term]) -> Factors:
    """The sum of ratio * ΔW over the terms, exactly; its rank is the sum of theirs, its alpha / rank the first one's.

    One term with the ratio 1 is that layer itself.
    """
    first, ratio = terms[0]
    if len(terms) == 1 and ratio == 1:
        return first
    dtype = torch.float64 if first.up.dtype == torch.float64 else torch.float32
    ups = [layer.up.to(dtype).flatten(1) * (share * layer.scale / first.scale) for layer, share in terms]
    downs = [layer.down.to(dtype).flatten(1) for layer, _ in terms]
    return first.shaped(torch.cat(ups, 1), torch.cat(downs), first.scale * sum(down.shape[0] for down in downs))


def largest_rank(terms: Sequence[Term]) -> int:
    """The largest rank among the terms: that of a sum which is to be no larger than its parts."""
    return max(layer.rank for layer, _ in terms)


def shuffle_ranks(layer: Factors) -> Factors:
    """The same ΔW with its ranks in another order, drawn from torch's global generator."""
    order = torch.randperm(layer.rank)
    return Factors(layer.down[order], layer.up[:, order], layer.alpha)


def _terms(sources: Sequence[WeightedFactors]) -> dict[str, list[Term]]:
    terms: dict[str, list[Term]] = {}
    for source in sources:
        for name, layer in source.layers.items():
            if (ratio := source.ratio(name)) != 0:
                terms.setdefault(name, []).append((layer, ratio))
    if not terms:
        raise AdapterError("all ratios are 0: nothing is left to sum", "give ratios such as 0.5 0.5")
    return terms


def _check(sources: Sequence[WeightedFactors]) -> None:
    """Refuse layers of one name whose ΔW have different shapes: their models differ."""
    seen: dict[str, tuple[str, tuple[int, int]]] = {}
    for source in sources:
        for name, layer in source.layers.items():
            shape = (layer.up.shape[0], layer.down[0].numel())
            where, expected = seen.setdefault(name, (source.name, shape))
            if shape != expected:
                raise AdapterError(
                    f"{name} is {expected[0]} x {expected[1]} in {where} and {shape[0]} x {shape[1]} in {source.name}",
                    "they were trained on models of different kinds: sum LoRAs of one kind",
                )
