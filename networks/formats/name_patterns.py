"""Match names of layers with the patterns of a PEFT configuration, in time that grows with their lengths alone.

PEFT takes regular expressions, and a file may hold one that keeps Python's engine busy for years: "(\\w+)+!". So they
are matched by their automata here (Thompson 1968, doi 10.1145/363347.363387), which visit each state at most once per
character: characters, classes, groups, alternatives and repetitions, with the meaning that Python gives them.
Look-around and back references, which no automaton has, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from library.limits import PATTERN, PATTERN_STATES
from library.messages import shortened

_PLAIN = re.compile(r"[\w./-]*")
_TOKEN = re.compile(
    r"\(\?:|\(\?P<\w+>|\(|\)|\||\[\^?\]?(?:\\.|[^\]\\])*+\]|\{\d{0,4}(?:,\d{0,4})?\}|[*+?]|\\.|[^\\\[]", re.DOTALL
)
_REPEATS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1), "{,}": (0, None)}
_MOST_FOLLOWED = 20_000  # steps that are remembered, for names that begin alike
_WITH_MEANING = re.compile(r"\\[0-9bBAZzuUxNg]|[*+?^${}]")  # what is not one character, at a place where one is wanted


@dataclass
class _State:
    """A state: `then` follows by a character that fits, `free` follow without one. `fits` remembers what was tried."""

    character: re.Pattern[str] | None = None
    then: int = -1
    free: list[int] = field(default_factory=list)
    fits: dict[str, bool] = field(default_factory=dict)

    def takes(self, character: str) -> bool:
        """Whether the next state follows by this character."""
        if self.character is None:
            return False
        if character not in self.fits:
            self.fits[character] = self.character.fullmatch(character) is not None
        return self.fits[character]


class NamePattern:
    """A pattern for the end of a dotted name, as PEFT applies it: `re.match(rf"(.*\\.)?({pattern})$", name)`.

    Raises ValueError, with the reason, for one that cannot be matched in bounded time.
    """

    def __init__(self, pattern: str) -> None:
        self._pattern = shortened(pattern)
        if len(pattern) > PATTERN:
            raise self._refused(f"it has more than {PATTERN} characters")
        try:
            re.compile(pattern)
            self._plain = re.compile(rf"(?:.*\.)?(?:{pattern})") if _PLAIN.fullmatch(pattern) else None
        except (re.error, RecursionError, OverflowError) as error:
            raise self._refused(f"it is no regular expression ({error})") from None
        self._states: list[_State] = []
        self._place = 0
        self._tokens: list[str] = _TOKEN.findall(pattern)
        self._is_whole = self._tokens[:1] == ["^"]
        ends = self._tokens[-1:] == ["$"]
        self._tokens = self._tokens[self._is_whole : len(self._tokens) - ends]
        if (self._is_whole or ends) and self._has_alternatives():
            raise self._refused("^ and $ beside alternatives are not supported: put these in brackets")
        self._followed: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        if self._plain is None:
            self._start = self._new()
            try:
                self._end = self._alternatives(self._start)
            except RecursionError:
                raise self._refused("it nests too deeply") from None

    @property
    def size(self) -> int:
        """The number of its states; 0 if it has no repetitions."""
        return len(self._states)

    def fits(self, name: str) -> bool:
        """Whether PEFT applies the pattern to a layer of this name."""
        if self._plain is not None:  # without repetitions, Python's engine is as quick
            return self._plain.fullmatch(name) is not None
        now = self._reached([self._start])
        for character in name:
            after = self._followed.get((now, character))
            if after is None:
                after = self._follow(now, character)
                if len(self._followed) < _MOST_FOLLOWED:
                    self._followed[now, character] = after
            now = after
        return self._end in now

    def _follow(self, now: frozenset[int], character: str) -> frozenset[int]:
        follow = [self._states[place].then for place in now if self._states[place].takes(character)]
        if character == "." and not self._is_whole:
            follow.append(self._start)
        return self._reached(follow)

    def _has_alternatives(self) -> bool:
        """Whether there is a | outside of all brackets."""
        depth = 0
        for token in self._tokens:
            depth += token.startswith("(") - (token == ")")
            if token == "|" and depth == 0:
                return True
        return False

    def _refused(self, why: str) -> ValueError:
        return ValueError(f"the pattern {self._pattern!r} is not used: {why}")

    def _new(self) -> int:
        if len(self._states) >= PATTERN_STATES:
            raise self._refused("it repeats too much")
        self._states.append(_State())
        return len(self._states) - 1

    def _reached(self, places: Iterable[int]) -> frozenset[int]:
        """These states and all that follow without a character."""
        found = set(places)
        waiting = list(found)
        while waiting:
            new = [place for place in self._states[waiting.pop()].free if place not in found]
            found.update(new)
            waiting += new
        return frozenset(found)

    # Each of these reads one part of the pattern, adds it after the state `start`, and returns the state where it ends.

    def _alternatives(self, start: int) -> int:
        end = self._new()
        self._states[self._sequence(start)].free.append(end)
        while self._peek() == "|":
            self._place += 1
            first = self._new()  # states before are of the alternative before
            self._states[start].free.append(first)
            self._states[self._sequence(first)].free.append(end)
        return end

    def _sequence(self, start: int) -> int:
        inner = self._new()
        self._states[start].free.append(inner)
        while self._peek() not in ("", "|", ")"):
            begin = self._place
            self._skip_one()
            least, most = self._repeats()
            after, self._place = self._place, begin
            inner = self._repeated(inner, begin, least, most)
            self._place = after
        return inner

    def _skip_one(self) -> None:
        """Move behind a character or a group."""
        depth = 0
        while True:
            depth += self._peek().startswith("(") - (self._peek() == ")")
            self._place += 1
            if depth == 0:
                return

    def _one(self, start: int) -> int:
        token = self._peek()
        self._place += 1
        end = self._new()
        if token.startswith("("):
            if self._peek() == "?":
                raise self._refused("only groups without options are supported")
            self._states[self._alternatives(start)].free.append(end)
            self._place += 1
            return end
        if _WITH_MEANING.match(token):
            raise self._refused(f"{token} is not supported there")
        self._states[start].character, self._states[start].then = re.compile(token, re.DOTALL), end
        return end

    def _repeats(self) -> tuple[int, int | None]:
        """How often the part before is repeated, at least and at most."""
        token = self._peek()
        if token in _REPEATS:
            least, most = _REPEATS[token]
        elif re.fullmatch(r"\{\d*(,\d*)?\}", token) and token != "{}":
            low, comma, high = token[1:-1].partition(",")
            least, most = int(low or 0), (int(high) if high else None) if comma else int(low)
        else:
            return 1, 1
        self._place += 1
        if self._peek() == "?":  # as few as possible: the same names
            self._place += 1
        elif self._peek() == "+":
            raise self._refused("possessive repetitions are not supported")
        return least, most

    def _repeated(self, start: int, begin: int, least: int, most: int | None) -> int:
        """Read the part at `begin` so many times."""
        end = self._new()
        place = start
        for turn in range(max(least, 1) if most is None else most):
            if turn >= least:
                self._states[place].free.append(end)
            self._place = begin
            first = self._new()
            self._states[place].free.append(first)
            place = self._one(first)
            if most is None and turn == max(least, 1) - 1:
                self._states[place].free.append(first)
        self._states[place].free.append(end)
        return end

    def _peek(self) -> str:
        return self._tokens[self._place] if self._place < len(self._tokens) else ""
