"""Tokens of captions are counted once."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.data.scan.caption_lengths import count_all

TEXTS = ["", "a dog", "犬 🐕", "a dog, sitting"]


@pytest.mark.parametrize("remembered", [True, False])
def test_every_text_is_counted_once_for_each_counter(tmp_path: Path, remembered: bool) -> None:
    index = tmp_path / "index" if remembered else None
    counted: list[str] = []

    def count(texts: list[str]) -> list[int]:
        counted.extend(texts)
        return [len(text) for text in texts]

    expected = {text: len(text) for text in TEXTS}
    assert count_all(TEXTS, count, "letters", index) == expected and counted == TEXTS
    assert count_all([*TEXTS, "new"], count, "letters", index) == expected | {"new": 3}
    assert counted[len(TEXTS) :] == (["new"] if remembered else [*TEXTS, "new"])
    doubled = count_all(TEXTS, lambda texts: [2 * len(text) for text in texts], "letters, doubled", index)
    assert doubled == {text: 2 * length for text, length in expected.items()}


def test_an_index_that_cannot_be_used_costs_the_time_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert count_all(TEXTS, lambda texts: [len(text) for text in texts], "letters", tmp_path / "file") == {
        text: len(text) for text in TEXTS
    }
