"""Patterns of PEFT configurations: they mean what they mean to Python's engine, and none takes long."""

from __future__ import annotations

import random
import re

import pytest

from library.limits import PATTERN, PATTERN_STATES, PATTERNS_STATES
from networks.adapter import AdapterError
from networks.formats import peft_config
from networks.formats.name_patterns import NamePattern

NAMES = ("", "a", "b.a", "mid_block.attentions.0.to_q", "mid_block.attentions.10.to_k", "to_q", "aab", "ab.ab", "1_.")
LONG = "down_blocks.1.attentions.0.transformer_blocks.9.attn1.to_out.0." + "a" * 100


def of_peft(pattern: str, name: str) -> bool:
    """As peft/tuners/tuners_utils.py, get_pattern_key, asks."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def made_up(rng: random.Random, depth: int = 0) -> str:
    """A random pattern of all that is supported."""
    kind = rng.random()
    if depth > 3 or kind < 0.45:
        return rng.choice(["a", "b", ".", r"\.", "[ab]", "[^a]", "[a-z_]", r"\w", r"\d", "1", "_"])
    if kind < 0.6:
        return made_up(rng, depth + 1) + made_up(rng, depth + 1)
    if kind < 0.75:
        return f"({made_up(rng, depth + 1)}|{made_up(rng, depth + 1)})"
    if kind < 0.8:
        return f"(?:{made_up(rng, depth + 1)}|(?P<name{rng.randrange(10**9)}>{made_up(rng, depth + 1)}))"
    if kind < 0.95:
        return (
            f"({made_up(rng, depth + 1)}){rng.choice(['*', '+', '?', '{2}', '{1,2}', '{,2}', '{1,}', '*?', '{2,3}?'])}"
        )
    return f"{made_up(rng, depth + 1)}|{made_up(rng, depth + 1)}"


def test_patterns_mean_what_they_mean_to_python() -> None:
    rng = random.Random(0)
    names = [*NAMES, *("".join(rng.choices("ab.1_", k=rng.randrange(8))) for _ in range(20))]
    fitted = 0
    for _ in range(300):
        pattern = rng.choice(["", "", "^"]) + made_up(rng) + rng.choice(["", "", "$"])
        try:
            read = NamePattern(pattern)
        except ValueError as error:
            assert re.search(r"\^ and \$ beside alternatives|repeats too much", str(error)), error
            continue
        for name in names:
            assert read.fits(name) == of_peft(pattern, name), (pattern, name)
            fitted += read.fits(name)
    assert fitted > 500


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(to_q|to_k)$", r"mid_block\.attentions\.\d+\.to_q", "to_q", r"^mid_block.*to_k$", r"(\w+\.)*to_(q|k)",
        "attentions.0.to_q", r"[^.]+\.0\.to_q",
    ],
)  # fmt: skip
def test_patterns_as_they_are_written_for_real_models(pattern: str) -> None:
    for name in NAMES:
        assert NamePattern(pattern).fits(name) == of_peft(pattern, name)


@pytest.mark.parametrize("pattern", [r"(\w+)+!", "(a|a)*b", "(.*.*.*.*.*)*!", "((a?){30}a{30})!", r"(([.]|\w)*)*\d!"])
def test_what_takes_pythons_engine_years_is_done_at_once(pattern: str) -> None:
    """The number of steps is bounded by states times characters: if it were not, this test would not end."""
    read = NamePattern(pattern)
    assert read.size <= PATTERN_STATES and not read.fits(LONG)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(?i)a", "groups without options"),
        ("(?!a)b", "groups without options"),
        (r"(a)\1", "not supported"),
        ("a{99999}", "not supported"),
        ("((a{1,99}){99}){99}", "repeats too much"),
        ("(" * 300 + "a" + ")" * 300, "nests too deeply|repeats too much|no regular"),
        ("a++", "possessive"),
        ("{}", "not supported"),
        ("a" * (PATTERN + 1), "more than 1000 characters"),
        ("*", "no regular expression"),
        ("(a", "no regular expression"),
        (r"\bto_q", "not supported"),
    ],
)  # fmt: skip
def test_what_is_not_matched_is_refused_with_the_reason(pattern: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        NamePattern(pattern)


def test_a_configuration_with_too_many_is_refused_before_all_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes milliseconds, and there may be ten thousand."""
    read: list[str] = []

    def counted(pattern: str) -> NamePattern:
        read.append(pattern)
        return NamePattern(pattern)

    monkeypatch.setattr(peft_config, "NamePattern", counted)
    patterns = {"[\x00-\uffff]" * 40 + str(number): 4 for number in range(100)}
    with pytest.raises(AdapterError, match="too many patterns"):
        peft_config.read_alphas({"alpha_pattern": patterns})
    assert len(read) <= PATTERNS_STATES / 40
