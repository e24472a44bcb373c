"""Wildcards: every alternative and nothing else; without nesting, the results of sd-scripts."""

from __future__ import annotations

import random
import re

import pytest

from library.data.wildcards import expand
from library.limits import NESTED_WILDCARDS


def outcomes(text: str) -> set[str]:
    return {expand(text, random.Random(seed).choice) for seed in range(300)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a {red|blue} ball", {"a red ball", "a blue ball"}),
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("{a||b}", {"a", "", "b"}),
        ("{{a|b}}", {"{a|b}"}),
        ("{a|{{b}}|c}", {"a", "{b}", "c"}),
        ("{a}}|b}", {"a}", "b"}),
        ("{alone}", {"alone"}),
        ("a | b, c|d", {"a | b, c|d"}),
        ("no } end, one }} more", {"no } end, one } more"}),
        ("{}", {"{}"}),
        ("", {""}),
    ],
)
def test_choices_are_those_of_sd_scripts(text: str, expected: set[str]) -> None:
    assert outcomes(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{a|{b|c}}", {"a", "b", "c"}),
        ("{a|{b|c} d|e}", {"a", "b d", "c d", "e"}),
        ("{a|x{b|{c|d}}}", {"a", "xb", "xc", "xd"}),
        ("{a|{b|{c|{d|e}}}} f", {"a f", "b f", "c f", "d f", "e f"}),
        ("{x {a|b}|c}", {"x a", "x b", "c"}),
        ("{{{a|b}}}", {"{a}", "{b}"}),
        ("{a|{b|{{c}}}}", {"a", "b", "{c}"}),
    ],
)
def test_choices_may_be_nested(text: str, expected: set[str]) -> None:
    assert outcomes(text) == expected


@pytest.mark.parametrize("text", ["{a|b", "a {", "{a|b, {c", "{a|", "|}"])
def test_what_is_never_closed_stays_as_it_was_written(text: str) -> None:
    assert expand(text, max) == text


def test_a_closed_choice_inside_of_an_open_one_is_drawn() -> None:
    assert outcomes("{a|{b|c}") == {"{a|b", "{a|c"}


def flat(rng: random.Random) -> str:
    """Text without nesting; words separate the pieces, so that braces do not merge."""
    pieces = []
    for _ in range(rng.randrange(6)):
        kind = rng.randrange(4)
        words = [rng.choice(("", "a", "b c", "{{d}}e", "f {{ g", "h")) for _ in range(rng.randrange(1, 5))]
        pieces.append(("word", "{{x", "y}}z", "{k" + "w|".join([*words, "v"]) + "}")[kind])
    return " - ".join(pieces)


def published(text: str, pick) -> str:
    """formats.md 4.1: doubled braces are literal, then {...} becomes one of its parts."""
    text = text.replace("{{", "\1").replace("}}", "\2")
    text = re.sub(r"\{([^}]+)\}", lambda found: pick(found.group(1).split("|")), text)
    return text.replace("\1", "{").replace("\2", "}")


@pytest.mark.parametrize(
    "pick", [lambda parts: parts[0], lambda parts: parts[-1], lambda parts: parts[len(parts) // 2]]
)
def test_flat_texts_are_read_as_published(pick) -> None:
    rng = random.Random(3)
    for _ in range(2000):
        text = flat(rng)
        assert expand(text, pick) == published(text, pick), text


def nested(rng: random.Random, depth: int) -> tuple[str, set[str]]:
    """A text and all its possible results."""
    text, expected = "", {""}
    for _ in range(rng.randrange(1, 3)):
        word = rng.choice(("a", "b", "c"))
        text, expected = text + word, {one + word for one in expected}
        if depth and rng.random() < 0.6:
            parts = [nested(rng, depth - 1) for _ in range(rng.randrange(2, 4))]
            text += "{" + "|".join(part for part, _ in parts) + "}"
            inside = set().union(*(results for _, results in parts))
            expected = {one + other for one in expected for other in inside}
    return text, expected


def test_nested_texts_become_one_of_what_they_may_become() -> None:
    rng = random.Random(4)
    for _ in range(200):
        text, expected = nested(rng, 2)
        for _ in range(20):
            assert expand(text, rng.choice) in expected, text
        assert expand(text, lambda parts: max(parts, key=len)) in {
            one for one in expected if len(one) == max(map(len, expected))
        }


def test_alternatives_come_equally_often() -> None:
    rng = random.Random(5)
    drawn = [expand("{a|b|c}", rng.choice) for _ in range(3000)]
    assert all(900 < drawn.count(letter) < 1100 for letter in "abc")


def test_ten_thousand_braces_are_no_trouble() -> None:
    assert expand("{ " * 10_000 + "}" * 10_000, min).strip() == ""


@pytest.mark.parametrize(
    "text", ["{ " * 200_000, "{a|" * 200_000, "{{" * 200_000, "}" * 200_000, "{ " * 300 + " }" * 300]
)
def test_braces_without_end_take_no_time(text: str) -> None:
    """Each unclosed brace copied the text behind it, so that a megabyte of them took minutes."""
    assert len(expand(text, lambda alternatives: alternatives[0])) <= len(text)


def test_wildcards_deeper_than_any_caption_are_text() -> None:
    for depth, expected in ((NESTED_WILDCARDS, "a"), (NESTED_WILDCARDS + 1, "{a}")):
        found = expand("{ " * depth + "a" + " }" * depth, lambda alternatives: alternatives[0])
        assert "".join(found.split()) == expected
