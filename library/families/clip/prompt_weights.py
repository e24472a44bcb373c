"""Weights in captions: (x) has weight 1.1, (x:1.3) has 1.3, [x] has 1/1.1; nested weights multiply.

Source: --weighted_captions of sd-scripts. A backslash escapes a bracket or backslash; unclosed brackets close at the
end of the caption, and an unmatched closing bracket is text. Only round brackets take a number. A hundred brackets
within each other and weights of 1000 are the limits. No torch: the plan counts the tokens of such captions.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from library.limits import LARGEST_WEIGHT, NESTED_WEIGHTS

STEP = 1.1

_TOKENS = re.compile(
    r"\\[()\[\]\\]"  # an escaped bracket or backslash
    r"|[(\[\])]"
    r"|:[+-]?(?:\d+\.?\d*|\.\d+)\)"  # a weight and the bracket it closes
    r"|[^\\()\[\]:]+|:|\\",
    re.ASCII,
)


def parse(caption: str) -> list[tuple[str, float]]:
    """Split a caption into pieces of equal weight, without the syntax; [("", 1.0)] for an empty caption."""
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # indices in `pieces` at which open brackets begin

    def close(bracket: str, weight: float) -> None:
        for place in range(opened[bracket].pop(), len(pieces)):
            text, before = pieces[place]
            pieces[place] = (text, max(-LARGEST_WEIGHT, min(before * weight, LARGEST_WEIGHT)))

    for token in _TOKENS.findall(caption):
        if token in opened and len(opened[token]) < NESTED_WEIGHTS:
            opened[token].append(len(pieces))
        elif token[0] == ":" and len(token) > 1 and opened["("]:
            close("(", max(-LARGEST_WEIGHT, min(float(token[1:-1]), LARGEST_WEIGHT)))
        elif token == ")" and opened["("]:
            close("(", STEP)
        elif token == "]" and opened["["]:
            close("[", 1 / STEP)
        else:
            pieces.append((token[1:] if token[0] == "\\" and len(token) > 1 else token, 1.0))
    for bracket, weight in (("(", STEP), ("[", 1 / STEP)):
        while opened[bracket]:
            close(bracket, weight)
    return _merged(pieces) or [("", 1.0)]


def _merged(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Merge neighbours of equal weight: a bracket that is only text must not split a word."""
    merged: list[tuple[str, float]] = []
    for text, weight in pieces:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged


def encode(caption: str, tokenize: Callable[[str], list[int]]) -> tuple[list[int], list[float]]:
    """Return a caption's ids, uncut and without begin and end, and their weights. Pieces are tokenized separately."""
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in parse(caption):
        piece = tokenize(text)
        ids += piece
        weights += [weight] * len(piece)
    return ids, weights


def rows(weights: list[float], width: int, chunks: int = 1) -> list[list[float]]:
    """Arrange weights in rows of 1 + `width` + 1, like the ids; begin, end and padding have weight 1."""
    filled = weights[: width * chunks] + [1.0] * (width * chunks - len(weights))
    return [[1.0, *filled[width * chunk : width * (chunk + 1)], 1.0] for chunk in range(chunks)]
