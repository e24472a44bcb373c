"""Split texts that hold several key=value: front-ends and shells pass what stands in one pair of quotes as one text."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable

_PAIR = re.compile(r"[A-Za-z_][\w.-]*=")
_BLANKS_AROUND_SIGN = re.compile(r"(^|[\s,;])([A-Za-z_][\w.-]*)\s*=\s*")
_NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?,?", re.IGNORECASE)
_OPENING, _CLOSING, _QUOTES = "([{", ")]}", "\"'"


class BadPair(ValueError):
    """A text that is not key=value. `fault` completes "the flag ..."; `remedy` says what to write."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(fault)
        self.fault = fault
        self.remedy = remedy


def split_pairs(texts: Iterable[str]) -> tuple[str, ...]:
    """One text for each key=value, without blanks around it and its first `=`.

    A text is split at blanks, commas and semicolons if each piece is key=value. Otherwise commas belong to the value
    (`betas=0.9,0.99`), as do separators in brackets and quotes. Raises BadPair for anything that could be read in two
    ways, and for a key with two values.
    """
    pairs = dict[str, str]()
    for text in filter(str.strip, texts):
        for pair in _split(_BLANKS_AROUND_SIGN.sub(r"\1\2=", text.strip())):
            key = pair.partition("=")[0]
            if pairs.setdefault(key, pair) != pair:
                raise BadPair(f'sets {key} twice, with "{pairs[key]}" and "{pair}"', "keep one of them")
    return tuple(pairs.values())


def _split(text: str) -> list[str]:
    words = [word.lstrip(",") for word in _pieces(text, " \t\r\n;") if word.strip(",")]
    if not words or not _PAIR.match(words[0]):
        raise BadPair(f'contains "{text}", which is not key=value', "write each argument as key=value")
    if not all(map(_PAIR.match, words)):
        _check_one_value(text, words)
        words = [text]
    return [pair for word in words for pair in _split_at_commas(word)]


def _split_at_commas(text: str) -> list[str]:
    pieces = _pieces(text, ",")
    if len(pieces) > 1 and not pieces[-1] and (len(pieces) == 2 or "=" in "".join(pieces[1:])):
        pieces.pop()  # a comma at the end; a longer list may end in an empty item
    pairs = [piece for piece in pieces if _PAIR.match(piece)]
    if len(pairs) == len(pieces):
        return pairs
    if len(pairs) == 1:
        return [text]
    raise BadPair(f'contains several arguments in one text, "{text}"', _one_text_each(pieces))


def _check_one_value(text: str, words: list[str]) -> None:
    """Blanks are part of a value that is a Python literal (`0.9, 0.99`) or that does not begin with a number or a
    switch: a path."""
    pairs = [word for word in words if _PAIR.match(word)]
    value = text.partition("=")[2]
    if len(pairs) == 1 and (_is_literal(value) or not _is_literal(words[0].partition("=")[2].rstrip(","))):
        return
    stray = next(word for word in words if not _PAIR.match(word))
    raise BadPair(f'contains "{text}", in which "{stray}" is not key=value', _one_text_each(words))


def _one_text_each(pieces: list[str]) -> str:
    """The way out, with the pieces as they seem to be meant: a number belongs to the key before it."""
    pairs = list[str]()
    for piece in pieces:
        if _PAIR.match(piece):
            pairs.append(piece)
        elif pairs and _NUMBER.fullmatch(piece):
            pairs[-1] = f"{pairs[-1].rstrip(',')},{piece}"
    listed = " ".join(f'"{pair}"' for pair in pairs)
    return f"write each argument as key=value in a text of its own, without blanks: {listed}"


def _is_literal(text: str) -> bool:
    if text.lower() in ("true", "false", "none"):
        return True
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError):
        return False
    return True


def _pieces(text: str, separators: str) -> list[str]:
    """The parts of a text between separators that are outside of brackets and quotes."""
    pieces, depth, quote, before = [""], 0, "", "="
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES and (before in "=, " or before in _OPENING):
            quote = character
        else:
            depth += (character in _OPENING) - (character in _CLOSING)
        if character in separators and depth <= 0 and not quote:
            pieces.append("")
        else:
            pieces[-1] += character
        before = character
    return [piece.strip() for piece in pieces]
