"""Weights in captions: (x) counts 1.1 times, (x:1.3) 1.3 times, [x] 1/1.1 times; nested ones multiply.

Source: --weighted_captions of kohya's sd-scripts. A backslash before a bracket or another backslash makes it a plain
one; brackets that are never closed close at the end, and a closing one without an opening one is text. Only round
brackets take a number. No torch here: the plan counts the tokens of such captions.
"""

from __future__ import annotations

import re
from collections.abc import Callable

STEP = 1.1

_TOKENS = re.compile(
    r"\\[()\[\]\\]"  # a plain bracket or backslash
    r"|[(\[\])]"
    r"|:[+-]?(?:\d+\.?\d*|\.\d+)\)"  # a weight, with the bracket that it closes
    r"|[^\\()\[\]:]+|:|\\",
    re.ASCII,
)


def parse(caption: str) -> list[tuple[str, float]]:
    """The caption in pieces of equal weight, without the marks; [("", 1.0)] for an empty one."""
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where in `pieces` what stands open begins

    def close(bracket: str, weight: float) -> None:
        for place in range(opened[bracket].pop(), len(pieces)):
            text, before = pieces[place]
            pieces[place] = (text, before * weight)

    for token in _TOKENS.findall(caption):
        if token in opened:
            opened[token].append(len(pieces))
        elif token[0] == ":" and len(token) > 1 and opened["("]:
            close("(", float(token[1:-1]))
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
    """Neighbours of equal weight in one piece: words must not fall apart at a bracket that is only text."""
    merged: list[tuple[str, float]] = []
    for text, weight in pieces:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged


def encode(caption: str, tokenize: Callable[[str], list[int]]) -> tuple[list[int], list[float]]:
    """Ids of a caption, uncut and without begin and end, and the weight of each. Pieces are tokenized one by one."""
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in parse(caption):
        piece = tokenize(text)
        ids += piece
        weights += [weight] * len(piece)
    return ids, weights


def rows(weights: list[float], width: int, chunks: int = 1) -> list[list[float]]:
    """Weights in rows of 1 + `width` + 1, as ids are chunked: begin, end and what fills a row up weigh 1."""
    filled = weights[: width * chunks] + [1.0] * (width * chunks - len(weights))
    return [[1.0, *filled[width * chunk : width * (chunk + 1)], 1.0] for chunk in range(chunks)]
