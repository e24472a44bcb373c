"""Wildcards in captions: {a|b|c} is one alternative, drawn for each sample; {{ and }} are literal braces.

Source: sd-scripts' --enable_wildcard. Unlike there, wildcards may be nested: {a|{b|c} d}.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from library.limits import NESTED_WILDCARDS

Pick = Callable[[list[str]], str]

_TOKENS = re.compile(r"\{\{|\}+|[{|]|[^{}|]+")


def expand(text: str, pick: Pick) -> str:
    """Replace each wildcard by the alternative that `pick` returns, inner wildcards first, left to right.

    An ambiguous }} closes an open {{ or a nested wildcard, and is a literal brace otherwise. A wildcard that begins
    with a wildcard needs a space in between, because {{ is a literal brace. {a} becomes a, {} stays {}, and an unclosed
    wildcard stays as written.
    """
    if "{" not in text and "}}" not in text:
        return text
    state = _State(pick)
    for token in _TOKENS.findall(text):
        if token == "{":
            state.open_wildcard()
        elif token == "{{":
            state.open_literal()
        elif token == "|":
            state.next_alternative()
        elif token.startswith("}"):
            state.close(len(token))
        else:
            state.add(token)
    return state.result()


class _State:
    def __init__(self, pick: Pick) -> None:
        self._pick = pick
        # alternatives so far, in pieces; the first is the text outside wildcards
        self._wildcards: list[list[list[str]]] = [[[]]]
        self._open: list[str] = []  # "{" or "{{", outermost first

    def add(self, text: str) -> None:
        self._wildcards[-1][-1].append(text)

    def open_wildcard(self) -> None:
        if len(self._wildcards) > NESTED_WILDCARDS:
            self.add("{")
            return
        self._wildcards.append([[]])
        self._open.append("{")

    def open_literal(self) -> None:
        self.add("{")
        self._open.append("{{")

    def next_alternative(self) -> None:
        if len(self._wildcards) == 1:
            self.add("|")
            return
        self._drop_literal_braces()
        self._wildcards[-1].append([])

    def close(self, count: int) -> None:
        """Handle `count` consecutive closing braces."""
        while count:
            is_outermost = self._open == ["{"]
            if count > 1 and (not self._open or self._open[-1] == "{{" or is_outermost):
                if self._open and not is_outermost:
                    self._open.pop()
                self.add("}")
                count -= 2
            elif len(self._wildcards) > 1:
                self._close_wildcard()
                count -= 1
            else:
                self.add("}")
                count -= 1

    def _close_wildcard(self) -> None:
        self._drop_literal_braces()
        self._open.pop()
        alternatives = ["".join(pieces) for pieces in self._wildcards.pop()]
        if alternatives == [""]:
            self.add("{}")
        else:
            self.add(alternatives[0] if len(alternatives) == 1 else self._pick(alternatives))

    def _drop_literal_braces(self) -> None:
        """Drop {{ that were not closed within the alternative that ends here."""
        while self._open[-1] == "{{":
            self._open.pop()

    def result(self) -> str:
        """The text, with unclosed wildcards as written."""
        outer, *unclosed = (["".join(pieces) for pieces in alternatives] for alternatives in self._wildcards)
        return outer[0] + "".join("{" + "|".join(alternatives) for alternatives in unclosed)
