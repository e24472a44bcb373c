"""The identifier in a caption gives way to the class."""

from __future__ import annotations

import pytest

from library.training.preservation.class_prompts import ClassPrompts

SKS = (("sks", "dog"),)


@pytest.mark.parametrize(
    ("pairs", "caption", "expected"),
    [
        (SKS, "sks dog", "dog"),
        (SKS, "sks on a beach", "dog on a beach"),
        (SKS, "a photo of SKS  Dog, grass", "a photo of dog, grass"),
        (SKS, "(sks dog:1.3), sks", "(dog:1.3), dog"),
        (SKS, "grass, a dog", None),
        (SKS, "sksy, my_sks", None),
        (SKS, "", None),
        ((("sks", "dog"), ("zwx", "fat cat")), "zwx fat cat and sks dog", "fat cat and dog"),
        ((("sks", "dog"), ("sks", "cat")), "sks cat, sks", "cat, dog"),
        ((("dog", "big dog"),), "dog and big dog", "big dog and big big dog"),  # once each, not again
        ((("犬太郎", "犬"),), "犬太郎 犬, 草", "犬, 草"),
        ((("a.b", "c+"),), "a.b c+, axb", "c+, axb"),
        ((), "sks dog", None),
    ],
)
def test_classes_for_identifiers(pairs: tuple[tuple[str, str], ...], caption: str, expected: str | None) -> None:
    assert ClassPrompts(pairs).of(caption) == expected
