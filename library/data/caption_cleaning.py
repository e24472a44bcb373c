"""Clean captions and tags that other programs wrote: the rules of sd-scripts' clean_captions_and_tags.py.

Captions are those of BLIP, tags those of DeepDanbooru and WD14: Danbooru's names, separated by a comma and a space.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_FACE = "^_^"  # the tag whose underscore is no space
# If an image has several people, tags that differ between them: all tags of a row are removed if it has more than one.
_LENGTH = re.compile(r"(long|short|medium) hair")
_OF_ONE_PERSON = (
    _LENGTH,
    re.compile(r"(bob|hime) cut"),
    re.compile(r"[\w-]+ eyes"),
    re.compile(r"[\w-]+ sleeves|sleeveless"),
    re.compile(
        r"ahoge|sidelocks|ponytail|twintails|two tails|two side up|([\w-]+ )?braid|[\w-]+ bun|single (hair|side) bun"
    ),
)
_HAIR = re.compile(r"[\w-]+ hair")
_ONE_WORD = re.compile(r"[\w-]+|hair ornament")
_WORDS_BEFORE = re.compile(r"(\w+ )+")

_STYLE = "(?:(?:anime|cartoon) )+"
# Applied to captions in this order.
_OF_CAPTIONS = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\byoung ", ""),
        (rf"\b{_STYLE}(?=(?:girl|lady|female|woman|women)s?\b)", ""),
        (rf"\b{_STYLE}character(?=s?\b)", "girl"),
        (r"\b(?:lady|female|woman|person)(?=s?\b)", "girl"),
        (r"\b(?:women|people)\b", "girls"),
        (r"\ba cartoon (?:anime )?(?=(?:figure|picture|drawing)\b)", "a "),
        (r"\ban? (?:anime )?cartoon (?=image\b)", "an "),
        (r"\banime (?:anime )+", "anime "),
        (r"\bgirl (?:girl )*(?=girls?\b)", ""),
        (r"\ban (?=girls?\b)", "a "),
    )
)


def clean_tags(text: str) -> str:
    """Tags with spaces for underscores, without ratings, without those that one of several people has, and without
    those that another tag says in more words (shirt beside white shirt)."""
    text = _FACE.join(part.replace("_", " ") for part in text.split(_FACE))
    tags = [tag for tag in text.split(", ") if not tag.startswith("rating")]
    if "girls" in text or "boys" in text:
        for several in _OF_ONE_PERSON:
            tags = _without_several(tags, several.fullmatch)
        tags = _without_several(tags, lambda tag: _HAIR.fullmatch(tag) and not _LENGTH.fullmatch(tag))
    return ", ".join(tag for tag in tags if not any(_says_more(other, tag) for other in tags))


def _without_several(tags: Sequence[str], is_one: Callable[[str], object]) -> list[str]:
    """The tags, without those that `is_one` holds for if there are two or more."""
    found = [tag for tag in tags if is_one(tag)]
    return [tag for tag in tags if tag not in found] if len(found) > 1 else list(tags)


def _says_more(other: str, tag: str) -> bool:
    """Whether a tag is another one with more words before it."""
    before = other.removesuffix(tag)
    return before != other and bool(_ONE_WORD.fullmatch(tag) and _WORDS_BEFORE.fullmatch(before))


def clean_caption(text: str) -> str:
    """A caption with one word, girl, for the people that captions of anime are about, and without its style."""
    for pattern, new in _OF_CAPTIONS:
        text = pattern.sub(new, text)
    return text
