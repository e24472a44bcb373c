"""Rank names by how little a text encoder knows of them. No torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from statistics import fmean

from library.rare_tokens.candidates import Name, merged_at


@dataclass(frozen=True)
class Measures:
    """Of a name in one text encoder; the smaller, the rarer.

    `norm`: how far the norm of the token's embedding is from the median of the vocabulary, as a share of it.
    `closeness`: the cosine with the nearest common word, `word`, in the same context. `moved`: how far the states of
    the class and of the end move when the name is written before the class, 1 - cosine.
    """

    norm: float
    closeness: float
    moved: float
    word: str = ""


@dataclass(frozen=True)
class Ranked:
    """A name and its `rarity`: the share of all candidates that are not rarer, 1 is the rarest. With measures it is the
    mean over the three, in the text encoder (`worst`) where it is lowest."""

    name: Name
    rarity: float
    measures: Mapping[str, Measures]
    worst: str = ""
    likeness: float | None = None


def rank_by_merges(names: Sequence[Name], candidates: Sequence[Name]) -> list[Ranked]:
    """Ranked by how late the tokenizers merged them, which needs no model."""
    pool = sorted(-merged_at(name) for name in candidates)
    return [Ranked(name, 1 - _share(-merged_at(name), pool), {}) for name in names]


def rank(measured: Mapping[str, Mapping[str, Measures]], names: Sequence[Name], pool: Sequence[Name]) -> list[Ranked]:
    """Ranked by the measures, given by text encoder and text, among the candidates of `pool`."""
    values = {
        encoder: [sorted(column) for column in zip(*(_numbers(texts[name.text]) for name in pool), strict=True)]
        for encoder, texts in measured.items()
    }
    ranked = []
    for name in names:
        rarities = {
            encoder: 1 - fmean(map(_share, _numbers(measured[encoder][name.text]), columns))
            for encoder, columns in values.items()
        }
        worst = min(rarities, key=rarities.__getitem__)
        ranked.append(Ranked(name, rarities[worst], {each: measured[each][name.text] for each in measured}, worst))
    return ranked


def rarest_first(ranked: Sequence[Ranked]) -> list[Ranked]:
    """The names in the order of their rarity; among equals those first that the tokenizers merged later."""
    return sorted(ranked, key=lambda each: (each.rarity, merged_at(each.name)), reverse=True)


def _numbers(measures: Measures) -> tuple[float, float, float]:
    norm, closeness, moved, _ = astuple(measures)
    return norm, closeness, moved


def _share(value: float, pool: Sequence[float]) -> float:
    """The share of the sorted pool that is smaller."""
    return bisect_left(pool, value) / len(pool) if pool else 0.0
