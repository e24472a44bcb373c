"""Choices inside a caption: {a|b|c} is one of them, drawn anew for each sample; {{ and }} are plain braces.

Source: sd-scripts' --enable_wildcard. What it leaves as it stands, a choice inside a choice, is read here: {a|{b|c} d}.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Pick = Callable[[list[str]], str]

_TOKENS = re.compile(r"\{\{|\}+|[{|]|[^{}|]+")


def expand(text: str, pick: Pick) -> str:
    """The text with each choice replaced by the alternative that `pick` takes, inner choices first, left to right.

    Where }} could mean both, it closes what stands open (a doubled brace, or a choice in another one), and is a plain
    brace otherwise. A choice that begins with a choice needs a blank between, as {{ is a plain brace. {a} is a, {}
    stays {}, and a choice that is never closed stays as it was written.
    """
    if "{" not in text and "}}" not in text:
        return text
    state = _State(pick)
    for token in _TOKENS.findall(text):
        if token == "{":
            state.open_choice()
        elif token == "{{":
            state.open_brace()
        elif token == "|":
            state.bar()
        elif token.startswith("}"):
            state.close(len(token))
        else:
            state.add(token)
    return state.finished()


class _State:
    def __init__(self, pick: Pick) -> None:
        self._pick = pick
        self._choices: list[list[str]] = [[""]]  # alternatives so far; the first is the text outside of choices
        self._open: list[str] = []  # "{" or "{{", outermost first

    def add(self, text: str) -> None:
        self._choices[-1][-1] += text

    def open_choice(self) -> None:
        self._choices.append([""])
        self._open.append("{")

    def open_brace(self) -> None:
        self.add("{")
        self._open.append("{{")

    def bar(self) -> None:
        if len(self._choices) == 1:
            self.add("|")
            return
        self._forget_braces()
        self._choices[-1].append("")

    def close(self, count: int) -> None:
        """A run of closing braces."""
        while count:
            alone_in_choice = self._open == ["{"]
            if count > 1 and (not self._open or self._open[-1] == "{{" or alone_in_choice):
                if self._open and not alone_in_choice:
                    self._open.pop()
                self.add("}")
                count -= 2
            elif len(self._choices) > 1:
                self._close_choice()
                count -= 1
            else:
                self.add("}")
                count -= 1

    def _close_choice(self) -> None:
        self._forget_braces()
        self._open.pop()
        alternatives = self._choices.pop()
        if alternatives == [""]:
            self.add("{}")
        else:
            self.add(alternatives[0] if len(alternatives) == 1 else self._pick(alternatives))

    def _forget_braces(self) -> None:
        """Doubled braces that were not closed inside the alternative that ends here."""
        while self._open[-1] == "{{":
            self._open.pop()

    def finished(self) -> str:
        while len(self._choices) > 1:
            unclosed = self._choices.pop()
            self.add("{" + "|".join(unclosed))
        return self._choices[0][0]
