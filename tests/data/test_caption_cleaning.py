"""Cleaning of captions and tags: the rules of sd-scripts' clean_captions_and_tags.py, worked out by hand."""

from __future__ import annotations

import pytest

from library.data.caption_cleaning import clean_caption, clean_tags


@pytest.mark.parametrize(
    ("tags", "cleaned"),
    [
        ("1girl, blue_eyes, hair_ornament, ^_^", "1girl, blue eyes, hair ornament, ^_^"),
        ("1girl, solo, rating:safe", "1girl, solo"),
        ("rating:safe, solo", "solo"),
        # one person may have several
        ("1girl, blue eyes, red eyes, bob cut, hime cut", "1girl, blue eyes, red eyes, bob cut, hime cut"),
        # of several people, whose are they?
        ("2girls, blue eyes, red eyes, sitting", "2girls, sitting"),
        ("2boys, blue eyes, sitting", "2boys, blue eyes, sitting"),
        ("2girls, long hair, blonde hair, brown hair, ponytail", "2girls, long hair, ponytail"),
        ("2girls, long hair, short hair, blonde hair", "2girls, blonde hair"),
        ("2girls, ponytail, side braid, hair bun, sleeveless, long sleeves", "2girls"),
        ("2girls, light brown hair, blonde hair", "2girls, light brown hair, blonde hair"),
        # said in more words
        ("shirt, white shirt, hat", "white shirt, hat"),
        ("hair ornament, red hair ornament, t-shirt, white t-shirt", "red hair ornament, white t-shirt"),
        ("cat ears, black cat ears", "cat ears, black cat ears"),
        ("shirt, undershirt", "shirt, undershirt"),
        ("", ""),
    ],
)
def test_tags(tags: str, cleaned: str) -> None:
    assert clean_tags(tags) == cleaned
    assert clean_tags(cleaned) == cleaned


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("a woman with a hat", "a girl with a hat"),
        ("two young women and a lady", "two girls and a girl"),
        ("an anime girl sitting", "a girl sitting"),
        ("anime anime girls", "girls"),
        ("a group of people", "a group of girls"),
        ("a cartoon character", "a girl"),
        ("cartoon characters", "girls"),
        ("the character of a house", "the character of a house"),
        ("a cartoon picture of a dog", "a picture of a dog"),
        ("an anime cartoon image of a dog", "an image of a dog"),
        ("a cartoon anime drawing", "a drawing"),
        ("a female person", "a girl"),
        ("a personal letter", "a personal letter"),  # no person
    ],
)
def test_captions(caption: str, cleaned: str) -> None:
    assert clean_caption(caption) == cleaned
