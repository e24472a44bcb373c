"""Caption processing against a plain implementation of sd-scripts, and the effect of each option."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from fractions import Fraction
from itertools import permutations
from types import SimpleNamespace

import pytest

from library.data.captions import longest_texts, process, tag_frequency
from library.options.datasets import CaptionSettings

CAPTIONS = ["", "a dog", "sks dog, on grass,, red ball , x", "a, b, c, d, e, f, g", " lone ", "a,b"]
MARKED = CaptionSettings(keep_tokens_separator="|||")


def plain(caption: str, rate: float, every: int, shuffle: bool, keep: int, rng: random.Random, epoch: int) -> str:
    """Dropout, split, shuffle, join."""
    dropped = rate > 0 and rng.random() < rate
    if dropped or (every > 0 and epoch % every == 0):
        return ""
    if not shuffle:
        return caption
    parts = []
    for part in caption.split(","):
        parts.append(part.strip())
    fixed = parts[:keep]
    flexible = parts[keep:]
    rng.shuffle(flexible)
    return ", ".join(fixed + flexible)


def once(caption: str, chosen: CaptionSettings, seed: int = 0, **place: int) -> str:
    return process(caption, chosen, random.Random(seed), 1, **place)


def every(caption: str, chosen: CaptionSettings) -> set[str]:
    return {once(caption, chosen, seed) for seed in range(300)}


@pytest.mark.parametrize("caption", CAPTIONS)
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("every", [0, 1, 3])
def test_the_steps_are_those_of_the_format(caption: str, rate: float, every: int) -> None:
    for shuffle in (False, True):
        for keep in (0, 1, 2, 99):
            chosen = CaptionSettings(shuffle, keep, rate, every)
            for epoch in range(1, 7):
                one, same = random.Random(epoch), random.Random(epoch)
                assert process(caption, chosen, one, epoch) == plain(caption, rate, every, shuffle, keep, same, epoch)


def test_every_nth_epoch_is_empty() -> None:
    texts = [process("x", CaptionSettings(dropout_every_n_epochs=2), random.Random(0), epoch) for epoch in range(1, 7)]
    assert texts == ["x", "", "x", "", "x", ""]


def test_the_dropout_rate_is_met_and_takes_prefix_and_suffix_with_it() -> None:
    rng = random.Random(1)
    chosen = CaptionSettings(dropout_rate=0.25, prefix="p", suffix="s")
    texts = [process("x", chosen, rng, 1) for _ in range(4000)]
    assert set(texts) == {"", "p x s"} and 900 < texts.count("") < 1100


def test_kept_tags_stay_and_the_others_all_come_everywhere() -> None:
    chosen = CaptionSettings(shuffle=True, keep_tokens=2)
    texts = [process("a, b, c, d, e", chosen, random.Random(seed), 1).split(", ") for seed in range(200)]
    assert all(text[:2] == ["a", "b"] and sorted(text) == list("abcde") for text in texts)
    assert {tuple(text[2:]) for text in texts} == set(permutations("cde"))


def test_without_steps_the_caption_is_untouched() -> None:
    assert process("a,b ,, c", CaptionSettings(keep_tokens=1), random.Random(0), 1) == "a,b ,, c"
    assert once("{a|b}, [c], (d)", CaptionSettings()) == "{a|b}, [c], (d)"


@pytest.mark.parametrize(
    ("prefix", "suffix", "caption", "expected"),
    [("p", "s", "a, b", "p a, b s"), ("p", "", "a", "p a"), ("", "s", "a", "a s"), ("p", "s", "", "p s")],
)
def test_prefix_and_suffix_are_joined_by_a_blank(prefix: str, suffix: str, caption: str, expected: str) -> None:
    assert once(caption, CaptionSettings(prefix=prefix, suffix=suffix)) == expected


def test_one_line_is_drawn_with_its_own_prefix_and_suffix() -> None:
    chosen = CaptionSettings(wildcard=True, prefix="p", suffix="s")
    assert every("x\n\ny, {v|w}\nz", chosen) == {"p x s", "p y, v s", "p y, w s", "p z s"}
    assert every("x\ny", replace(chosen, wildcard=False)) == {"p x s"}
    assert every("x", replace(chosen, prefix="{q|r}")) == {"q x s", "r x s"}
    assert once("", CaptionSettings(wildcard=True)) == ""


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a, b ||| c, d", "a, b, c, d"),
        ("a, b, ||| ,c,, d ||| e,", "a, b, c, d, e"),
        ("a ||| b ||| c ||| d", "a, b, c, d"),
        ("||| a", "a"),
        ("a|||", "a"),
        ("|||", ""),
        ("a,b || c", "a,b || c"),
    ],
)
def test_the_mark_of_fixed_tags_never_stays_in_the_text(caption: str, expected: str) -> None:
    assert once(caption, MARKED) == expected
    for other in ({"wildcard": True}, {"prefix": "", "keep_tokens": 1}, {"dropout_rate": 1e-9}):
        assert once(caption, replace(MARKED, **other)) == expected


def test_tags_before_the_mark_and_after_its_second_place_stay() -> None:
    chosen = replace(MARKED, shuffle=True, keep_tokens=4)  # the mark wins over the number
    assert every("a, b ||| c, d, e ||| y, z", chosen) == {
        ", ".join(["a", "b", *middle, "y", "z"]) for middle in permutations("cde")
    }
    assert every("a ||| b, c", replace(chosen, tag_dropout_rate=0.5)) == {"a", "a, b", "a, c", "a, b, c", "a, c, b"}
    assert once("a ||| b, c ||| d", replace(chosen, tag_dropout_rate=1.0)) == "a, d"


@pytest.mark.parametrize(
    ("separator", "caption", "expected"),
    [
        (",", "a,b , c", "a, b, c"),
        (";", "a, b;c", "a, b; c"),
        (", ", "a, b", "a, b"),
        (" ", "a b", "a b"),
        ("|", "a|b,c", "a| b,c"),
        ("", "a, b", "a, b"),
    ],
)
def test_tags_are_joined_by_the_separator_of_the_user(separator: str, caption: str, expected: str) -> None:
    chosen = CaptionSettings(separator=separator, keep_tokens=9, shuffle=True)
    assert once(caption, chosen) == expected


def test_tags_under_a_secondary_separator_travel_together() -> None:
    chosen = CaptionSettings(shuffle=True, secondary_separator=";;;")
    assert every("a;;;b, c, d;;;e", chosen) == {
        ", ".join(order).replace(";;;", ",") for order in permutations(("a;;;b", "c", "d;;;e"))
    }
    assert once("a;;;b, c", CaptionSettings(secondary_separator=";;;")) == "a,b, c"


@pytest.mark.parametrize("count", [0, 1, 2, 5, 12])
@pytest.mark.parametrize("least", [0, 1, 3])
@pytest.mark.parametrize("until", [1, 7, 10])
def test_the_warm_up_brings_the_tags_one_by_one(count: int, least: int, until: int) -> None:
    caption = ", ".join(f"t{place}" for place in range(count + 1))
    chosen = CaptionSettings(keep_tokens=1, warmup_min=least, warmup_step=until)
    for step in range(until + 3):
        expected = count
        if step < until:
            expected = min(count, math.floor(Fraction(step * (count - least), until)) + least)
        for shuffle in (False, True):
            tags = once(caption, replace(chosen, shuffle=shuffle), step, step=step).split(", ")
            assert tags[0] == "t0" and set(tags[1:]) == {f"t{place + 1}" for place in range(expected)}


def test_a_warm_up_below_one_is_a_share_of_the_run() -> None:
    share, steps = CaptionSettings(warmup_step=0.25), CaptionSettings(warmup_step=12)
    for step in range(20):
        # floor(0.25 * 50) = 12
        assert once("a, b, c, d", share, step=step, steps=50) == once("a, b, c, d", steps, step=step, steps=50)
    assert once("a, b", share) == "a, b"  # nobody knows of how many steps


def test_tags_are_dropped_at_their_rate_and_kept_ones_never() -> None:
    rng = random.Random(2)
    chosen = CaptionSettings(keep_tokens=1, tag_dropout_rate=0.25)
    texts = [process("k, a, b", chosen, rng, 1) for _ in range(4000)]
    assert set(texts) == {"k", "k, a", "k, b", "k, a, b"}
    assert 900 < sum("a" not in text for text in texts) < 1100
    assert 180 < texts.count("k") < 320  # 1/16: the tags fall each for itself


@pytest.mark.parametrize("seed", range(40))
def test_an_option_leaves_the_draws_of_the_others_alone(seed: int) -> None:
    tags = ", ".join("abcdefg")
    shuffled = once(tags, CaptionSettings(shuffle=True), seed).split(", ")
    dropping = CaptionSettings(tag_dropout_rate=0.4)
    stays = once(tags, dropping, seed).split(", ")
    both = once(tags, replace(dropping, shuffle=True), seed).split(", ")
    assert both == [tag for tag in shuffled if tag in stays]

    wild = CaptionSettings(wildcard=True)
    caption = "{p|q|r}, {s|t}\n{u|v|w}, {x|y}"
    alone = once(caption, wild, seed).split(", ")
    assert sorted(once(caption, replace(wild, shuffle=True), seed).split(", ")) == sorted(alone)
    assert once(caption, replace(wild, tag_dropout_rate=1e-9, warmup_step=5), seed, step=9).split(", ") == alone
    assert once(caption, replace(wild, dropout_rate=0.5), seed) in ("", ", ".join(alone))


def test_the_generator_moves_on_whatever_is_drawn() -> None:
    rng = random.Random(0)
    assert {process("{a|b}", CaptionSettings(wildcard=True), rng, 1) for _ in range(50)} == {"a", "b"}
    before = rng.getstate()
    process("a", CaptionSettings(), rng, 1)
    after = rng.getstate()
    rng.setstate(before)
    process("a, b, c\nd", CaptionSettings(True, 0, 0.5, wildcard=True, tag_dropout_rate=0.5), rng, 1)
    assert rng.getstate() == after != before


LONG = CaptionSettings(
    shuffle=True, prefix="p", suffix="s", secondary_separator=";;", keep_tokens_separator="|||", wildcard=True
)


def test_the_longest_texts_bound_what_is_made() -> None:
    caption = "a, {b|bbb|{cc|dddd}} ||| e;;f\n{g|hh}, i"
    longest = longest_texts(caption, LONG)
    assert sorted(longest) == ["p a, dddd, e,f s", "p hh, i s"]
    made = every(caption, LONG)
    assert {tuple(sorted(text)) for text in longest} <= {tuple(sorted(text)) for text in made}
    assert max(map(len, made)) == max(map(len, longest))


def test_the_longest_choice_is_measured_as_asked() -> None:
    chosen = CaptionSettings(wildcard=True)
    assert longest_texts("{aaaa|b c}", chosen) == ["aaaa"]
    assert longest_texts("{aaaa|b c}", chosen, lambda text: len(text.split())) == ["b c"]
    assert longest_texts("a,b ,, {c|d}\ne", CaptionSettings()) == ["a,b ,, {c|d}"]


def test_tags_are_counted_as_sd_scripts_counts_them() -> None:
    records = [
        SimpleNamespace(subset=0, caption="A dog, Red ball ,, a DOG", repeats=10),
        SimpleNamespace(subset=1, caption="a dog; b", repeats=1),
        SimpleNamespace(subset=2, caption="", repeats=1),
        SimpleNamespace(subset=2, caption="a\nb, a", repeats=1),
    ]
    assert tag_frequency(records, ("10_dog", "10_dog", "1_cat")) == {
        "10_dog": {"a dog": 2, "red ball": 1, "a dog; b": 1},
        "1_cat": {"a": 2, "b": 1},
    }
