"""Ranking by hand-made measures."""

from __future__ import annotations

import pytest

from library.rare_tokens.candidates import Name
from library.rare_tokens.ranking import Measures, rank, rank_by_merges, rarest_first


def name(text: str, *ids: int) -> Name:
    return Name(text, {f"te{number}": (index,) for number, index in enumerate(ids)}, {})


A, B, C = name("a", 10, 90), name("b", 20, 20), name("c", 30, 40)


def test_the_smallest_measures_are_the_rarest() -> None:
    measured = {"te0": {"a": Measures(0.1, 0.2, 0.3), "b": Measures(0.2, 0.1, 0.4), "c": Measures(0.3, 0.3, 0.5)}}
    ranked = rarest_first(rank(measured, [A, B, C], [A, B, C]))
    # a: 0, 1 and 0 thirds are rarer; b: 1, 0, 1; c: 2, 2, 2
    assert [each.name.text for each in ranked] == ["a", "b", "c"]
    assert [each.rarity for each in ranked] == pytest.approx([1 - 1 / 9, 1 - 2 / 9, 1 - 6 / 9])


def test_of_two_text_encoders_the_worse_counts() -> None:
    """a is the rarest in the first and the least rare in the second."""
    low, middle, high = Measures(0.1, 0.1, 0.1), Measures(0.2, 0.2, 0.2), Measures(0.3, 0.3, 0.3)
    measured = {"te0": {"a": low, "b": middle, "c": high}, "te1": {"a": high, "b": middle, "c": low}}
    ranked = rarest_first(rank(measured, [A, B, C], [A, B, C]))
    assert [(each.name.text, each.worst) for each in ranked] == [("b", "te0"), ("c", "te0"), ("a", "te1")]
    assert [each.rarity for each in ranked] == pytest.approx([2 / 3, 1 / 3, 1 / 3])


def test_a_checked_name_is_compared_with_the_candidates_and_not_with_itself() -> None:
    measured = {"te0": {"a": Measures(0.1, 0.1, 0.1), "b": Measures(0.3, 0.3, 0.3), "x": Measures(0.2, 0.2, 0.4)}}
    (checked,) = rank(measured, [name("x", 5)], [A, B])
    assert checked.rarity == pytest.approx(1 - (1 / 2 + 1 / 2 + 1) / 3)


def test_merges_rank_by_the_lowest_id() -> None:
    ranked = rarest_first(rank_by_merges([A, B, C], [A, B, C]))
    assert [each.name.text for each in ranked] == ["c", "b", "a"] and ranked[0].rarity == 1
