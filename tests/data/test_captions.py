"""Caption steps against a plain writing of the steps of sd-scripts."""

from __future__ import annotations

import random
from itertools import permutations

import pytest

from library.data.captions import CaptionSettings, process, settings
from library.options.dataset import DatasetOptions

CAPTIONS = ["", "a dog", "sks dog, on grass,, red ball , x", "a, b, c, d, e, f, g", " lone ", "a,b"]


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


def test_the_dropout_rate_is_met() -> None:
    rng = random.Random(1)
    dropped = sum(process("x", CaptionSettings(dropout_rate=0.25), rng, 1) == "" for _ in range(4000))
    assert 900 < dropped < 1100


def test_kept_tags_stay_and_the_others_all_come_everywhere() -> None:
    chosen = CaptionSettings(shuffle=True, keep_tokens=2)
    texts = [process("a, b, c, d, e", chosen, random.Random(seed), 1).split(", ") for seed in range(200)]
    assert all(text[:2] == ["a", "b"] and sorted(text) == list("abcde") for text in texts)
    assert {tuple(text[2:]) for text in texts} == set(permutations("cde"))


def test_without_steps_the_caption_is_untouched() -> None:
    assert process("a,b ,, c", CaptionSettings(keep_tokens=1), random.Random(0), 1) == "a,b ,, c"


def test_settings_of_the_options() -> None:
    options = DatasetOptions(
        shuffle_caption=True, keep_tokens=2, caption_dropout_rate=0.1, caption_dropout_every_n_epochs=3
    )
    assert settings(options) == CaptionSettings(True, 2, 0.1, 3)
