"""Mistakes are collected and reported together."""

from __future__ import annotations

import pytest

from library.options.mistakes import Mistake, Mistakes, UserError


def test_all_mistakes_are_raised_together_with_their_remedies() -> None:
    mistakes = Mistakes()
    mistakes.raise_if_any()
    mistakes.add("the first", "do this")
    mistakes.extend([Mistake("the second"), Mistake("the first", "do this")])
    assert mistakes and len(mistakes) == 2
    with pytest.raises(UserError) as raised:
        mistakes.raise_if_any()
    assert raised.value.mistakes == (Mistake("the first", "do this"), Mistake("the second"))
    assert all(text in str(raised.value) for text in ("the first", "do this", "the second"))
