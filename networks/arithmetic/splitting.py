"""Split a DyLoRA into LoRAs of lower ranks: its first ranks alone are an adapter (arXiv 2210.07558)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from networks.arithmetic.factors import Factors


def split(
    layers: Mapping[str, Factors], unit: int, *, keep_alpha: bool = False
) -> Iterator[tuple[int, dict[str, Factors]]]:
    """(rank, layers) for the multiples of `unit` below the file's largest rank."""
    largest = max(layer.rank for layer in layers.values())
    for rank in range(unit, largest, unit):
        yield rank, {name: first_ranks(layer, rank, keep_alpha=keep_alpha) for name, layer in layers.items()}


def first_ranks(layer: Factors, rank: int, *, keep_alpha: bool = False) -> Factors:
    """The first `rank` ranks of a layer, with the alpha that gives the ΔW of training at this rank.

    Training scales by alpha / dim * sqrt(dim / rank), hence alpha' = alpha * sqrt(rank / dim). `keep_alpha`: keep the
    file's alpha, as sd-scripts' tool does.
    """
    if rank >= layer.rank:
        return layer
    alpha = layer.alpha if keep_alpha else layer.alpha * math.sqrt(rank / layer.rank)
    return Factors(layer.down[:rank], layer.up[:, :rank], alpha)
